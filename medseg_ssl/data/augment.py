"""Augmentation by name: ``none``, ``weak``, ``strong``, ``segmentation`` (``_dropout``); recipes are records.

The spatial part is drawn here and folded into the crop's one interpolation by the loader; the intensity part
runs on the device in ``prepare_batch`` (see ``augment_intensity``): on a GPU host that split was measured
fastest, and on a CPU it costs nothing. Every number drawn is a function of (seed, global sample index, view).

No recipe mirrors. Left and right are anatomy (liver and spleen, labels with sides), so is up; where a task
has no sides, an objective sets ``ViewSpec.mirror_axes`` (0 superior-inferior, 1 anterior-posterior, 2
left-right).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, NamedTuple

import numpy as np
from pydantic import Field

from medseg_ssl.config import Record
from medseg_ssl.data.augment_intensity import INTENSITY, Intensity, augmented
from medseg_ssl.types import ViewPlan

if TYPE_CHECKING:
    from medseg_ssl.types import Batch

Share = Annotated[float, Field(ge=0, le=1)]


class Spatial(Record):
    """Random rotation, scale, shift and mirroring of one crop.

    Attributes:
        rotation_p: probability of a rotation.
        rotation_deg: largest angle about each axis; drawn evenly and applied in millimetres.
        scale_p: probability of a change of scale, the same on all axes.
        scale: range of the physical extent the crop covers; above 1 things look smaller.
        shift_p: probability of a shift.
        shift: largest shift as a share of the crop's side, per axis, in whole voxels.
        mirror_axes: axes (D 0, H 1, W 2) each mirrored with probability 0.5.
        anisotropy: with voxels longer than this many times their shortest side, rotation is about the long
            axis only, since turning thick slices into each other blurs everything. A crop of at
            most ``THIN`` slices is turned and scaled within its plane only, so that it shows slices that were taken.
    """

    rotation_p: Share = 0.0
    rotation_deg: Annotated[float, Field(ge=0, le=180)] = 0.0
    scale_p: Share = 0.0
    scale: tuple[float, float] = (1.0, 1.0)
    shift_p: Share = 0.0
    shift: Share = 0.0
    mirror_axes: tuple[int, ...] = ()
    anisotropy: float = 3.0


class Move(NamedTuple):
    """A drawn move: rotation and scale in mm (None for neither), shift in crop shares, mirrored axes."""

    linear_33: np.ndarray | None
    shift: np.ndarray
    flip: tuple[bool, bool, bool]


THIN = 5
"""Voxels along an axis up to which a crop is a slice, or a few."""

SPATIAL: dict[str, Spatial] = {
    "none": Spatial(),
    "weak": Spatial(scale_p=0.3, scale=(0.9, 1.1), shift_p=0.5, shift=0.05),
    "strong": Spatial(rotation_p=0.3, rotation_deg=30, scale_p=0.3, scale=(0.7, 1.4), shift_p=0.5, shift=0.1),
    # nnU-Net v2.8 `get_training_transforms` for isotropic 3D patches, without its mirroring
    "segmentation": Spatial(rotation_p=0.2, rotation_deg=30, scale_p=0.2, scale=(0.7, 1.4)),
    "segmentation_dropout": Spatial(rotation_p=0.2, rotation_deg=30, scale_p=0.2, scale=(0.7, 1.4)),
}
"""Spatial recipe by the name in ``ViewSpec.augment``."""


def draw_move(
    recipe: Spatial, generator: np.random.Generator, *, spacing_mm: Sequence[float], size: Sequence[int]
) -> Move:
    """Draw one augmentation; always takes the same number of draws.

    Args:
        recipe: probabilities and ranges.
        generator: of this sample and view.
        spacing_mm: voxel size (D, H, W) of the crop.
        size: voxels (D, H, W) of the crop.
    """
    chance, drawn = generator.random(3), generator.random(10)
    linear = None
    thin = np.array([n <= THIN for n in size]) & (max(size) > THIN)
    if chance[0] < recipe.rotation_p and recipe.rotation_deg:
        angles = np.deg2rad(recipe.rotation_deg) * (2 * drawn[:3] - 1)
        spacing = np.asarray(spacing_mm, float)
        if spacing.max() > recipe.anisotropy * spacing.min():
            angles = np.where(np.arange(3) == spacing.argmax(), angles, 0.0)
        if thin.any():
            angles = np.where(thin, angles, 0.0) if thin.sum() == 1 else np.zeros(3)
        linear = rotation(angles)
    if chance[1] < recipe.scale_p and recipe.scale != (1.0, 1.0):
        low, high = recipe.scale
        linear = (np.eye(3) if linear is None else linear) * (low + drawn[3] * (high - low))
        linear[thin, thin] = 1.0
    shift = recipe.shift * (2 * drawn[4:7] - 1) if chance[2] < recipe.shift_p else np.zeros(3)
    flip = [axis in recipe.mirror_axes and bool(drawn[7 + axis] < 0.5) for axis in range(3)]
    return Move(linear, shift, (flip[0], flip[1], flip[2]))


def rotation(angles: np.ndarray) -> np.ndarray:
    """Rotation matrix (3, 3) about the D, then H, then W axis, angles in radians."""
    turned = np.eye(3)
    for axis, angle in enumerate(angles):
        i, j = [k for k in range(3) if k != axis]
        one = np.eye(3)
        one[i, i] = one[j, j] = np.cos(angle)
        one[i, j], one[j, i] = -np.sin(angle), np.sin(angle)
        turned = one @ turned
    return turned


def prepare_batch(batch: Batch, plan: ViewPlan, *, recipes: Mapping[str, Intensity] = INTENSITY) -> Batch:
    """Finish a batch on its device: intensity augmentation of every view, by the name its spec gives.

    Args:
        batch: from the loader.
        plan: the plan it was made by.
        recipes: intensity recipes by name.

    Returns:
        A batch whose augmented views hold the untouched image in ``clean_BCDHW``, which restoration and teachers look
        at. Labeled views do not: no supervised loss reads the image, and a second one costs time and memory.
    """
    views = {}
    indices = batch.sample_index_B.tolist()
    for name, many in batch.views.items():
        recipe = recipes[plan[name].augment]
        common = {"seed": batch.seed, "indices": indices, "keep_clean": not plan[name].labeled}
        views[name] = [
            augmented(view, recipe, purpose=f"{name}/{k}", **common) for k, view in enumerate(many)
        ]
    return replace(batch, views=views)
