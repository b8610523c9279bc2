"""What exports of a segmenter as a graph share: what goes in, and the check that the same comes out."""

from __future__ import annotations

from collections.abc import Callable

import torch
from pydantic import Field
from torch import Tensor, nn

from medseg_ssl.config import UserError
from medseg_ssl.nets.encoder_file import Card, Loaded
from medseg_ssl.nets.exports.base import ExportConfig
from medseg_ssl.types import Triple, TripleMm

TOLERANCE = 1e-4
"""Of a logit, absolute and relative."""


class GraphConfig(ExportConfig):
    """Options of an export as a graph.

    Attributes:
        size: voxels (D, H, W) of the graph's input, or of the example that it is made with; None takes the card's
            crop.
        dynamic: let batch and size vary. It is tried at a second size, and refused where the output is not the
            segmenter's.
        spacing_mm: voxel size (D, H, W) of its volumes; None takes the card's.
    """

    size: tuple[int, int, int] | None = Field(default=None)
    spacing_mm: TripleMm | None = None
    dynamic: bool = False


class AtSpacing(nn.Module):
    """A segmenter for volumes of one voxel size, as a function of the volume alone."""

    def __init__(self, loaded: Loaded, *, what: str, spacing_mm: TripleMm | None = None) -> None:
        """Take the segmenter of a file.

        Args:
            loaded: the file.
            what: the format, for messages.
            spacing_mm: of its volumes; None takes the card's.

        Raises:
            UserError: the file holds an encoder, or a segmenter that needs a voxel size and none is stated.
        """
        super().__init__()
        if loaded.card.kind != "segmenter":
            raise UserError(
                f"{what} is of a segmenter; this file holds an encoder: fine-tune it first, or export it --to nnunet "
                "or monai"
            )
        self.segmenter = loaded.segmenter()
        self.spacing_mm: TripleMm | None = spacing_mm or loaded.card.spacing_mm
        if self.spacing_mm is None and loaded.card.encoder.get("spacing_mm") is not None:
            raise UserError(
                "this segmenter thinks in millimetres and was trained on scans of several voxel sizes; a graph has one:"
                " state it by spacing_mm='[D, H, W]'"
            )
        self.eval()

    def forward(self, image_BCDHW: Tensor) -> Tensor:
        """Logits (B, K, D, H, W)."""
        if self.spacing_mm is None:
            return self.segmenter(image_BCDHW)
        spacing_mm_B3 = image_BCDHW.new_tensor([self.spacing_mm]).expand(image_BCDHW.shape[0], 3)
        return self.segmenter(image_BCDHW, spacing_mm_B3)


def example(card: Card, config: GraphConfig) -> Tensor:
    """A volume of noise (1, C, D, H, W) to make the graph with.

    Raises:
        UserError: neither the options nor the card state a size.
    """
    size = config.size or card.crop_size
    if size is None:
        raise UserError("the card states no crop; give the graph's input by size='[D, H, W]'")
    if min(size) < 1:
        raise UserError(f"size must be at least 1 along each axis, got {size}")
    return _noise(1, card.channels_in, size)


def check(
    module: nn.Module, run: Callable[[Tensor], Tensor], image_BCDHW: Tensor, *, dynamic: bool, where: str
) -> tuple[str, ...]:
    """Compare a graph's output with the module's and tell how far they are apart.

    Args:
        module: the original.
        run: the graph, as the other software runs it.
        image_BCDHW: the example that it was made with.
        dynamic: compare at a second size and batch too.
        where: the other software, for messages.

    Raises:
        UserError: the outputs differ, or the graph cannot be run at the second size.
    """
    images = [image_BCDHW]
    if dynamic:
        d, h, w = image_BCDHW.shape[2:]
        images.append(_noise(2, image_BCDHW.shape[1], (d + 3, h + 6, w + 1)))
    lines = []
    for image in images:
        size = " x ".join(map(str, image.shape[2:]))
        with torch.no_grad():
            expected = module(image)
        try:
            found = run(image)
        except Exception as error:  # whatever the other software raises
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()[:200]
            raise UserError(
                f"{where} cannot run the graph at {size} voxels: {reason}; export without dynamic"
            ) from error
        if found.shape != expected.shape or not torch.allclose(
            found, expected, atol=TOLERANCE, rtol=TOLERANCE
        ):
            apart = (
                f"shape {tuple(found.shape)}" if found.shape != expected.shape else _apart(found, expected)
            )
            hint = "; its size is built into it: export without dynamic" if len(lines) == 1 else ""
            raise UserError(f"{where} gives another output at {size} voxels ({apart}){hint}")
        lines.append(f"same output in {where} at {size} voxels, {_apart(found, expected)}")
    return tuple(lines)


def _apart(found: Tensor, expected: Tensor) -> str:
    return f"logits at most {(found - expected).abs().max().item():.1e} apart"


def _noise(batch: int, channels: int, size: Triple) -> Tensor:
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(0))


def beside(card: Card) -> dict[str, bytes]:
    """The card as a file: intensity policy, spacing, classes and all else that whoever runs the graph must know."""
    return {".json": (card.model_dump_json(indent=2) + "\n").encode()}
