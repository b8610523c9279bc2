"""The door of scikit-image: thresholds, flooding and morphology of the classical baselines."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from medseg_ssl.config import UserError
from medseg_ssl.types import Triple


def check_library() -> None:
    """Fail before any case is read where the library is not installed.

    Raises:
        UserError: scikit-image is not there.
    """
    try:
        import skimage  # noqa: F401
    except ImportError:
        raise UserError(
            "this baseline needs the package scikit-image: pip install 'medseg-ssl[classical]'"
        ) from None


def otsu_thresholds(values_N: np.ndarray, *, levels: int, bins: int) -> tuple[float, ...]:
    """The ``levels`` − 1 values that part intensities with the largest variance between the parts; equal goes above.

    Otsu, IEEE Trans. SMC 1979; several levels: Liao et al., J. Inf. Sci. Eng. 2001. Fewer thresholds where there are
    fewer different values than levels.
    """
    from skimage.filters import threshold_multiotsu, threshold_otsu

    counts, edges = np.histogram(values_N, bins=bins)
    levels = min(levels, int(np.count_nonzero(counts)))
    if levels < 2:
        return ()
    # a bin by its upper edge: what the bin holds lies below the threshold then, wherever in the bin it is
    hist = (counts, edges[1:])
    found = [threshold_otsu(hist=hist)] if levels == 2 else threshold_multiotsu(hist=hist, classes=levels)
    return tuple(float(value) for value in found)


def flood(inside_DHW: np.ndarray, seed: Triple) -> np.ndarray:
    """The face-connected part of a bool volume that holds a voxel; nothing where that voxel is False."""
    from skimage.segmentation import flood

    if not inside_DHW[seed]:
        return np.zeros_like(inside_DHW)
    return np.asarray(flood(inside_DHW.view(np.uint8), seed, connectivity=1))


def largest_piece(region_DHW: np.ndarray) -> np.ndarray:
    """The largest face-connected part of a bool volume, the first one of several."""
    from skimage.measure import label

    pieces = np.asarray(label(region_DHW, connectivity=1))
    sizes = np.bincount(pieces.ravel())
    sizes[0] = 0
    return pieces == sizes.argmax() if len(sizes) > 1 else region_DHW


def opened(region_DHW: np.ndarray, radius_mm: float, *, spacing_mm: Sequence[float]) -> np.ndarray:
    """What a ball of a radius in mm can reach inside a bool volume; the volume itself at radius 0."""
    from skimage.morphology import isotropic_dilation, isotropic_erosion

    if radius_mm <= 0 or region_DHW.all():
        return region_DHW
    kept_DHW = np.asarray(isotropic_erosion(region_DHW, radius_mm, spacing=tuple(spacing_mm)))
    if not kept_DHW.any():  # distances to nothing are no distances
        return kept_DHW
    return np.asarray(isotropic_dilation(kept_DHW, radius_mm, spacing=tuple(spacing_mm)))
