"""An encoder, a decoder and one 1×1×1 head per supervised level: a volume in, logits out."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medseg_ssl.nets.blocks import initialise
from medseg_ssl.nets.decoders.base import Decoder
from medseg_ssl.nets.encoders.base import Encoder

SILENT = -1e4
"""Logit of a class that is never to be predicted: its probability is 0 in float32 and in bfloat16."""


class Segmenter(nn.Module):
    """Segments with any encoder and decoder from the shelves.

    Attributes:
        heads: one 1×1×1 convolution per supervised decoder level, finest first; head 0 makes the
            segmentation.
        strides_out: stride of each level's logits, finest first.
    """

    def __init__(
        self,
        encoder: Encoder,
        decoder: Decoder,
        classes: int,
        *,
        supervised_levels: int | None = None,
        heads: nn.ModuleList | None = None,
    ) -> None:
        """Put the parts together.

        Args:
            encoder: makes the pyramid.
            decoder: reads it.
            classes: logits per voxel, background included.
            supervised_levels: levels that get a head; None all of the decoder's, 1 no deep supervision.
            heads: heads that exist, finest level first, in place of new ones.

        Raises:
            ValueError: fewer than two classes, or more levels than the decoder has.
        """
        super().__init__()
        levels = len(decoder.channels_out)
        count = levels if supervised_levels is None else supervised_levels
        count = count if heads is None else len(heads)
        if classes < 2:
            raise ValueError(f"a segmenter needs at least 2 classes (background first), got {classes}")
        if not 1 <= count <= levels:
            raise ValueError(f"supervised_levels must lie in 1 to {levels} for this decoder, got {count}")
        self.encoder = encoder
        self.decoder = decoder
        self.classes = classes
        self.strides_out = tuple(decoder.strides_out[:count])
        if heads is None:
            heads = nn.ModuleList(nn.Conv3d(c, classes, 1) for c in decoder.channels_out[:count])
            for head in heads:
                initialise(head)
        self.heads = heads

    def forward(self, image_BCDHW: Tensor, spacing_mm_B3: Tensor | None = None) -> Tensor:
        """Logits (B, K, D, H, W) at the size of the image."""
        features = self.decoder(self.encoder(image_BCDHW, spacing_mm_B3))
        return _at_size(self.heads[0](features[0]), image_BCDHW)

    def all_logits(self, image_BCDHW: Tensor, spacing_mm_B3: Tensor | None = None) -> list[Tensor]:
        """Logits of every supervised level, finest first, for deep supervision.

        The first has the size of the image, level i ceil(size / ``strides_out[i]``) voxels.
        """
        logits = self.level_logits(image_BCDHW, spacing_mm_B3)
        return [_at_size(logits[0], image_BCDHW), *logits[1:]]

    def level_logits(self, image_BCDHW: Tensor, spacing_mm_B3: Tensor | None = None) -> list[Tensor]:
        """Logits of every supervised level at the level's own size, finest first."""
        features = self.decoder(self.encoder(image_BCDHW, spacing_mm_B3))
        return [head(map_) for head, map_ in zip(self.heads, features, strict=False)]


@torch.no_grad()
def silence(heads: Iterable[nn.Module], classes: Collection[int]) -> None:
    """Make heads never predict some classes: weight 0 and bias ``SILENT``, where no gradient reaches them.

    Raises:
        ValueError: background among the classes.
    """
    if 0 in classes:
        raise ValueError("the background cannot be silenced")
    for head in heads if classes else ():
        assert isinstance(head, nn.Conv3d)
        assert head.bias is not None
        for index in classes:
            head.weight[index] = 0.0
            head.bias[index] = SILENT


@torch.no_grad()
def inherit_heads(heads: Iterable[nn.Module], previous: Iterable[nn.Module], *, fresh: Sequence[int]) -> None:
    """Take over the heads of a segmenter whose classes come first here; new classes begin as shares of its background.

    Background and new classes get the background's weight, and its bias less the logarithm of their number: together
    they are as likely as the background was, and every other class keeps its probability (MiB, arXiv 2002.00718).

    Args:
        heads: finest level first; levels that the other one has no head for stay as they are.
        previous: likewise.
        fresh: classes that the other one does not know or never predicts.
    """
    for head, old in zip(heads, previous, strict=False):
        assert isinstance(head, nn.Conv3d)
        assert isinstance(old, nn.Conv3d)
        assert head.bias is not None
        assert old.bias is not None
        head.weight[: len(old.weight)] = old.weight
        head.bias[: len(old.bias)] = old.bias
        sharing = [0, *fresh]
        head.weight[sharing] = old.weight[:1]
        head.bias[sharing] = old.bias[0] - math.log(len(sharing))


def _at_size(logits_BKDHW: Tensor, image_BCDHW: Tensor) -> Tensor:
    # encoders whose finest map is already strided (patch encoders) need a last step up
    size = image_BCDHW.shape[2:]
    if logits_BKDHW.shape[2:] == size:
        return logits_BKDHW
    return F.interpolate(logits_BKDHW, size=size, mode="trilinear", align_corners=False)


def nnunet_head_name(name: str, *, levels: int) -> str:
    """The name of a head's parameter (``heads.0.weight``) in nnU-Net's ``UNetDecoder``."""
    _, level, rest = name.split(".", 2)
    return f"decoder.seg_layers.{levels - 1 - int(level)}.{rest}"
