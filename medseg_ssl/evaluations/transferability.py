"""Does an encoder suit a labeled task, told from frozen features before any fine-tuning?

Labeled crops go through the frozen encoder; the features of all levels at single voxels, standardised, are put to a
Bayesian linear model of the voxels' classes, whose log evidence is the estimate (LogME, arXiv 2102.11005; for voxels of
a segmentation as arXiv 2307.11958 argues, with classes drawn evenly). Only training labels are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from medseg_ssl.analysis.similarity import log_evidence
from medseg_ssl.config import ConfigError, UserError
from medseg_ssl.data.loader import Loader
from medseg_ssl.draws import numpy_generator
from medseg_ssl.evaluations.base import Evaluation, EvaluationConfig
from medseg_ssl.evaluations.segmentation import labeled_cases
from medseg_ssl.inference.frozen import FrozenEncoder
from medseg_ssl.inference.inputs import crop_size_of
from medseg_ssl.types import UNKNOWN_LABEL, Score, Triple, View, ViewSpec

if TYPE_CHECKING:
    from medseg_ssl.data.archive import Archive
    from medseg_ssl.nets.encoders.base import Encoder

FOREGROUND_SHARE = 0.67
"""Of the crops; the rest lie anywhere, so that background is not only what surrounds the classes."""


class Transferability(Evaluation):
    """Log evidence of the classes under frozen features."""

    reads_labels = True

    class Config(EvaluationConfig):
        """Which voxels.

        Attributes:
            split: name of the archive's split.
            subset: which of its lists; never the test subjects.
            crops: labeled crops, spread over the cases.
            places: voxels per crop, drawn evenly over the classes it shows.
            crop_size: voxels (D, H, W); null takes the size the encoder was trained on.
            seed: of crops and voxels.
        """

        split: str = "default"
        subset: Literal["train", "development"] = "train"
        crops: int = Field(default=48, ge=4)
        places: int = Field(default=32, ge=2)
        crop_size: Triple | None = None
        seed: int = 0

    config: Config
    sparing = MappingProxyType({"crops": 24})

    def run(self, model: FrozenEncoder, archive: Archive) -> Iterator[Score]:
        """Yield ``logme``.

        Raises:
            ConfigError: ``model`` is no encoder.
            UserError: no labeled case of one channel in the subset, or a single class.
        """
        if not isinstance(model, FrozenEncoder):
            raise ConfigError("transferability looks at an encoder's features, not at a segmenter")
        channels = archive.facts().channels
        if channels != 1:
            raise UserError(
                f"transferability looks at cases of one channel; those of this archive have {channels}"
            )
        cases = labeled_cases(archive, split=self.config.split, subset=self.config.subset)
        size = self.config.crop_size or crop_size_of(model.card)
        spec = ViewSpec(count=1, size=size, spacing_mm=model.card.spacing_mm, labeled=True)
        views = labeled_views(archive, cases, spec, crops=self.config.crops, seed=self.config.seed)
        voxels = draw_voxels(views, places=self.config.places, seed=self.config.seed)
        yield Score("logme", estimate(model.encoder, views, voxels), "nats per voxel")


class Voxels(NamedTuple):
    """Drawn voxels: index (N, P, 3) in each crop and class (N, P), ``UNKNOWN_LABEL`` where none is known."""

    index_NP3: np.ndarray
    class_NP: np.ndarray


def labeled_views(
    archive: Archive, cases: Sequence[str], spec: ViewSpec, *, crops: int, seed: int
) -> list[View]:
    """Labeled crops one by one, not augmented, as fine-tuning would cut them.

    Raises:
        UserError: cases of different numbers of channels, or a damaged archive.
    """
    loader = Loader(archive, {"labeled": spec}, batch_size=1, steps=crops, seed=seed, cases=cases,
                    foreground_share=FOREGROUND_SHARE)  # fmt: skip
    return [batch.views["labeled"][0] for batch in loader]


def draw_voxels(views: Sequence[View], *, places: int, seed: int) -> Voxels:
    """Draw voxels in every crop: a class among those it shows, then a voxel of it with data.

    Background of a case that states some classes alone may be one of the others: its class is unknown.
    """
    index, classes = [], []
    for number, view in enumerate(views):
        assert view.label_BDHW is not None
        generator = numpy_generator(seed, number, "transferability/places")
        label_DHW = view.label_BDHW[0].numpy().copy()
        label_DHW[~view.valid_BDHW[0].numpy()] = UNKNOWN_LABEL
        flat = label_DHW.ravel()
        shown = [k for k in np.unique(flat) if k != UNKNOWN_LABEL] or [UNKNOWN_LABEL]
        wanted_P = generator.choice(shown, places)
        # one draw per place whatever the classes, so that crops stay independent of one another
        chance_P = generator.random(places)
        members = {k: np.flatnonzero(flat == k) for k in shown}
        chosen_P = [members[k][int(c * len(members[k]))] for k, c in zip(wanted_P, chance_P, strict=True)]
        index.append(np.stack(np.unravel_index(chosen_P, label_DHW.shape), axis=1))
        classes.append(np.where(wanted_P == 0, UNKNOWN_LABEL, wanted_P) if _in_part(view) else wanted_P)
    return Voxels(np.stack(index), np.stack(classes).astype(np.int64))


def _in_part(view: View) -> bool:
    """Whether the case of a crop states some classes alone."""
    return view.known_classes_BK is not None and not bool(view.known_classes_BK.all())


@torch.inference_mode()
def voxel_features(encoder: Encoder, views: Sequence[View], voxels: Voxels) -> list[np.ndarray]:
    """Features (N, P, E) of every level at the drawn voxels, from the voxel of the map that holds each."""
    encoder.eval()
    device = next(encoder.parameters()).device
    found: list[list[np.ndarray]] = []
    for view, index_P3 in zip(views, voxels.index_NP3, strict=True):
        maps = encoder(view.image_BCDHW.to(device), view.spacing_mm_B3.to(device))
        found.append([_at(m, index_P3, s) for m, s in zip(maps, encoder.strides, strict=True)])
    return [np.stack(level) for level in zip(*found, strict=True)]


def _at(map_BCDHW: Tensor, index_P3: np.ndarray, stride: Triple) -> np.ndarray:
    last = np.array(map_BCDHW.shape[2:]) - 1
    place_P3 = torch.from_numpy(np.minimum(index_P3 // np.array(stride), last))
    d, h, w = place_P3.to(map_BCDHW.device).unbind(dim=1)
    return map_BCDHW[0, :, d, h, w].T.float().cpu().numpy()


def estimate(encoder: Encoder, views: Sequence[View], voxels: Voxels) -> float:
    """Log evidence per voxel of the classes under the features of all levels; only values of the same voxels compare.

    Raises:
        UserError: the crops show a single class, or none of them voxels that are known to be background.
    """
    features_NPE = np.concatenate(voxel_features(encoder, views, voxels), axis=2)
    known_NP = voxels.class_NP != UNKNOWN_LABEL
    classes = voxels.class_NP[known_NP]
    if len(np.unique(classes)) < 2:
        raise UserError("the labeled crops show a single class, so there is nothing to tell apart")
    if not (classes == 0).any() and any(map(_in_part, views)):
        raise UserError(
            "every labeled crop is of a case that states some classes alone, so no voxel is known to be background"
        )
    features_VE = features_NPE[known_NP].astype(np.float64)
    spread_E = features_VE.std(axis=0)
    features_VE = (features_VE - features_VE.mean(axis=0)) / np.where(spread_E > 0, spread_E, 1.0)
    # standardised features leave the classes' share of voxels to a constant
    return log_evidence(np.column_stack([features_VE, np.ones(len(features_VE))]), classes)
