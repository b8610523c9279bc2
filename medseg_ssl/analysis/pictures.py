"""Small PNG pictures of slices with the contours of truth and prediction."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

CLASS_COLOURS = ("#ff5a5f", "#4cc9f0", "#ffd166", "#80ed99", "#c77dff", "#ff9f1c", "#f72585", "#90e0ef")
TRUTH_COLOUR = "#ffffff"


@dataclass(frozen=True)
class Slice:
    """One axial slice of a test case.

    Attributes:
        case: key of the case.
        image_HW: uint8 grey values, rows towards anterior, columns towards the patient's right.
        truth_HW: uint8 classes of the label.
        prediction_HW: uint8 classes of the prediction.
        spacing_mm: pixel size (H, W).
    """

    case: str
    image_HW: np.ndarray
    truth_HW: np.ndarray
    prediction_HW: np.ndarray
    spacing_mm: tuple[float, float]


def write_slices(path: Path, slices: Sequence[Slice]) -> None:
    """Write slices into one compressed ``.npz``."""
    arrays: dict[str, np.ndarray] = {"cases": np.array([s.case for s in slices])}
    for index, item in enumerate(slices):
        arrays[f"{index}.image"] = item.image_HW
        arrays[f"{index}.truth"] = item.truth_HW
        arrays[f"{index}.prediction"] = item.prediction_HW
        arrays[f"{index}.spacing_mm"] = np.asarray(item.spacing_mm)
    with Path(path).open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def read_slices(path: Path) -> dict[str, Slice]:
    """Case to its slice, from what ``write_slices`` wrote."""
    with np.load(path, allow_pickle=False) as file:
        out = {}
        for index, case in enumerate(file["cases"].tolist()):
            height, width = file[f"{index}.spacing_mm"].tolist()
            parts = [file[f"{index}.{name}"] for name in ("image", "truth", "prediction")]
            out[case] = Slice(case, *parts, spacing_mm=(height, width))
    return out


def contour_png(item: Slice, *, longest: int = 320) -> bytes:
    """The slice as PNG in radiological orientation: truth in white, prediction in the class's colour.

    Args:
        item: the slice.
        longest: pixels of the longer side.
    """
    canvas_HW3 = _canvas(item, longest)
    _draw_contours(canvas_HW3, item.truth_HW, of_truth=True)
    _draw_contours(canvas_HW3, item.prediction_HW, of_truth=False)
    return _png(canvas_HW3)


def saliency_png(item: Slice, strength_HW: np.ndarray, *, longest: int = 320) -> bytes:
    """The slice as PNG under a map (uint8; red, yellow where it is strong), with the truth in white.

    Args:
        item: the slice.
        strength_HW: on its grid.
        longest: pixels of the longer side.
    """
    canvas_HW3 = _canvas(item, longest)
    strength_HW1 = _resized(strength_HW, canvas_HW3.shape, smooth=True)[..., None] / 255.0
    heat_HW3 = np.concatenate([np.ones_like(strength_HW1), strength_HW1, 0.2 * strength_HW1], axis=-1) * 255.0
    opacity_HW1 = 0.8 * strength_HW1
    canvas_HW3[...] = np.round(canvas_HW3 * (1 - opacity_HW1) + heat_HW3 * opacity_HW1)
    _draw_contours(canvas_HW3, item.truth_HW, of_truth=True)
    return _png(canvas_HW3)


def _canvas(item: Slice, longest: int) -> np.ndarray:
    """The grey slice in square millimetres, (H, W, 3) uint8."""
    height_mm, width_mm = (n * s for n, s in zip(item.image_HW.shape, item.spacing_mm, strict=True))
    scale = longest / max(height_mm, width_mm)
    shape = (max(1, round(height_mm * scale)), max(1, round(width_mm * scale)))
    return np.stack([_resized(item.image_HW, shape, smooth=True)] * 3, axis=-1)


def _resized(array_HW: np.ndarray, shape: Sequence[int], *, smooth: bool) -> np.ndarray:
    """Rows from anterior to posterior, columns from the patient's right to the left, at another size."""
    from PIL import Image

    kind = Image.Resampling.BICUBIC if smooth else Image.Resampling.BILINEAR
    upright = Image.fromarray(np.ascontiguousarray(array_HW[::-1, ::-1]).astype(np.uint8))
    return np.asarray(upright.resize((shape[1], shape[0]), kind))


def _draw_contours(canvas_HW3: np.ndarray, labels_HW: np.ndarray, *, of_truth: bool) -> None:
    for value in np.unique(labels_HW[(labels_HW > 0) & (labels_HW < 255)]):
        inside_HW = _resized((labels_HW == value) * 255, canvas_HW3.shape, smooth=False) >= 128
        colour = TRUTH_COLOUR if of_truth else CLASS_COLOURS[(int(value) - 1) % len(CLASS_COLOURS)]
        canvas_HW3[_outline(inside_HW)] = tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))


def _png(canvas_HW3: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    # Pillow's `optimize` would save a seventh of the bytes for ten times the time
    Image.fromarray(canvas_HW3).save(buffer, format="PNG")
    return buffer.getvalue()


def _outline(inside_HW: np.ndarray) -> np.ndarray:
    """A line two pixels wide just inside the border of a region; the picture's border counts as inside."""
    core_HW = inside_HW
    for _ in range(2):
        padded = np.pad(core_HW, 1, mode="edge")
        core_HW = core_HW & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return inside_HW & ~core_HW
