"""Records that cross the borders between rooms, and the legend of shape suffixes.

Suffix letters name dimensions: B batch, C channel, D H W voxels (z superior, y anterior, x right of the
canonical RAS+ volume), L tokens, K kept tokens or classes, E embedding, N points.
Affines ending in ``_44`` map a homogeneous (D, H, W) index to RAS millimetres (x, y, z).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

Triple = tuple[int, int, int]
TripleMm = tuple[float, float, float]

MODALITIES = ("CT", "MR", "PT")
RELATIONS = ("registered", "same_frame", "same_study", "same_subject")
ALIGNED = ("registered", "same_frame")
"""Relations whose scans share physical coordinates."""
AUGMENTS = ("none", "weak", "strong", "segmentation", "segmentation_dropout")
UNKNOWN_LABEL = 255
"""Label value of a voxel whose class nobody stated; it enters no loss and no metric."""


@dataclass(frozen=True)
class ViewSpec:
    """What an objective asks the loader for: ``count`` crops of ``size`` voxels (D, H, W).

    Attributes:
        count: views per sample under this name.
        size: crop size in voxels (D, H, W).
        spacing_mm: voxel size (D, H, W) the view is resampled to; None keeps the archive's spacing.
        augment: one of ``AUGMENTS``; the spatial part is drawn independently for each view.
        pair: ``none`` takes all views from one scan (or case); ``same_box`` takes view 0 and view 1 from two
            scans of a pair, cut so that they overlap physically; ``same_subject`` takes them from two scans of
            a pair at independent places.
        overlap: smallest share of each axis two views of one scan (or of a ``same_box`` pair) have in common when
            they are placed; an augmentation that moves each by itself takes some of it. None means independent places.
        labeled: True draws from labeled cases and fills ``View.label_BDHW``.
        pool: ``drawn`` cuts the view from the sample's own scans; ``all`` from another case, one of all those of the
            training subjects that look like the labeled ones (same modalities), whose label is never read.
        mirror_axes: axes (D 0, H 1, W 2) each mirrored with probability 0.5; the named augmentation mirrors none.
    """

    count: int
    size: Triple
    spacing_mm: TripleMm | None = None
    augment: str = "none"
    pair: Literal["none", "same_box", "same_subject"] = "none"
    overlap: float | None = None
    labeled: bool = False
    pool: Literal["drawn", "all"] = "drawn"
    mirror_axes: tuple[int, ...] = ()


ViewPlan = Mapping[str, ViewSpec]


@dataclass
class View:
    """One crop of one or more scans of a subject, batched.

    Attributes:
        image_BCDHW: float32 intensities after the intensity policy, and after augmentation once
            ``prepare_batch`` has run; exactly 0 where ``valid_BDHW`` is False.
        valid_BDHW: bool, False = no data (outside the field of view, padding, defaced).
        foreground_BDHW: bool, True = body (never air or no data).
        affine_B44: float64, crop index (D, H, W, 1) to RAS millimetres of the scan, the view's own spatial
            augmentation included.
        spacing_mm_B3: float32 voxel size (D, H, W).
        modality_B: modality of channel 0, one of ``MODALITIES``.
        clean_BCDHW: the same crop before intensity augmentation; None while nothing was augmented, and in labeled
            views, where no loss reads it (``prepare_batch``).
        label_BDHW: uint8 classes; ``UNKNOWN_LABEL`` where unknown.
        known_classes_BK: bool, which classes (background first) the annotator stated in this case.
        noted_mm_B: voxel sizes as numbers, noted by ``to`` when the view leaves the host; ``voxel_mm_B`` reads them.
    """

    image_BCDHW: Tensor
    valid_BDHW: Tensor
    foreground_BDHW: Tensor
    affine_B44: Tensor
    spacing_mm_B3: Tensor
    modality_B: list[str]
    clean_BCDHW: Tensor | None = None
    label_BDHW: Tensor | None = None
    known_classes_BK: Tensor | None = None
    noted_mm_B: tuple[TripleMm, ...] | None = None

    @property
    def voxel_mm_B(self) -> tuple[TripleMm, ...]:
        """Voxel size (D, H, W) of each sample as numbers, without waiting for the device the view was sent to."""
        if self.noted_mm_B is not None:
            return self.noted_mm_B
        return tuple((d, h, w) for d, h, w in self.spacing_mm_B3.tolist())

    @property
    def target_BCDHW(self) -> Tensor:
        """The image without intensity augmentation; of a labeled view the image as it is."""
        return self.image_BCDHW if self.clean_BCDHW is None else self.clean_BCDHW

    def to(self, device, non_blocking: bool = True) -> View:
        """The same view with every tensor on ``device`` (affines stay float64 on the CPU's precision)."""
        moved = {
            name: value.to(device, non_blocking=non_blocking)
            for name, value in vars(self).items()
            if hasattr(value, "to")
        }
        return replace(self, **moved, noted_mm_B=self.voxel_mm_B)


@dataclass
class Batch:
    """What ``Objective.forward`` gets.

    Attributes:
        views: name in the ``ViewPlan`` to its ``count`` views.
        subject_B: subject key per sample.
        relation_B: relation of the pair per sample, ``""`` for unpaired views.
        sample_index_B: int64 global sample index; with ``seed`` it determines every random draw.
        seed: seed of the run.
        scans_B: scan keys per sample, for messages.
    """

    views: dict[str, list[View]]
    subject_B: list[str]
    relation_B: list[str]
    sample_index_B: Tensor
    seed: int
    scans_B: list[tuple[str, ...]] = field(default_factory=list)

    def to(self, device, non_blocking: bool = True) -> Batch:
        """The same batch with every view on ``device``."""
        views = {n: [v.to(device, non_blocking) for v in vs] for n, vs in self.views.items()}
        return replace(self, views=views)


@dataclass(frozen=True)
class Facts:
    """What a network and an objective must know of an archive before they are built.

    Attributes:
        channels: input channels of a view.
        classes: class names, background first; empty without labels.
        modalities: modalities that occur.
        relations: relations of the pairs that occur.
    """

    channels: int = 1
    classes: tuple[str, ...] = ()
    modalities: tuple[str, ...] = ()
    relations: tuple[str, ...] = ()


@dataclass(frozen=True)
class Template:
    """The mean of many scans of one anatomy and modality, and where the voxels of each scan lie in it.

    Attributes:
        keys: scans, in the order of S.
        to_lattice_S44: float64, RAS millimetres of the scan to an index (D, H, W) of its lattice.
        place_S3DHW: float32, at each lattice point the template voxel (D, H, W) it shows; linear between points.
        reference_DHW: the mean, in units of the intensity policy.
        weight_DHW: share of the scans that show body at a template voxel.
        likeness_S: mean squared local correlation of each scan with the mean, 0 to 1.
        spacing_mm: side of a template voxel.
    """

    keys: tuple[str, ...]
    to_lattice_S44: Tensor
    place_S3DHW: Tensor
    reference_DHW: Tensor
    weight_DHW: Tensor
    likeness_S: Tensor
    spacing_mm: float


class Score(NamedTuple):
    """One number of an evaluation.

    ``per_case`` rows hold the columns of the evaluation's table (case, class, …), where it has one; ``pictures`` are
    PNG files by name, of real subjects perhaps, so that they are kept beside the scores and sent nowhere.
    """

    name: str
    value: float
    unit: str
    per_case: list[dict[str, object]] | None = None
    pictures: Mapping[str, bytes] | None = None
