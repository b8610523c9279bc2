"""What can go wrong with a scan, in physical units and at a stated strength.

Graded common corruptions (arXiv 1903.12261), for scans: each is a pure function of the scan, the strength and the seed.
Where there is no data, nothing is blurred in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from medseg_ssl.draws import numpy_generator

FWHM = 2.0 * np.sqrt(2.0 * np.log(2.0))
"""Full width at half maximum of a Gaussian of standard deviation 1."""


@dataclass(frozen=True)
class Volume:
    """A scan in physical units.

    Attributes:
        array_DHW: float32.
        valid: False where there is no data; None means data everywhere.
        spacing_mm: voxel size (D, H, W).
        range: spread between the 0.5th and the 99.5th percentile of its body, in its own unit.
        content: what names the scan in random draws.
    """

    array_DHW: np.ndarray
    valid: np.ndarray | None
    spacing_mm: Sequence[float]
    range: float
    content: str


@dataclass(frozen=True)
class Corruption:
    """One kind: the modalities it makes sense for, the unit of its strength, and what it does.

    ``apply`` takes the volume, the strength and a generator and returns voxels and where they hold data.
    """

    modalities: frozenset[str]
    unit: str
    apply: Callable[[Volume, float, np.random.Generator], tuple[np.ndarray, np.ndarray | None]]


def corrupt(kind: str, volume: Volume, amount: float, *, seed: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Apply one corruption; the draws depend on the seed, the kind and the scan's voxels, not on the strength.

    So a stronger noise is the same noise, only stronger.
    """
    generator = numpy_generator(seed, 0, f"corruption/{kind}/{volume.content}")
    array_DHW, valid = CORRUPTIONS[kind].apply(volume, amount, generator)
    return array_DHW.astype(np.float32, copy=False), valid


def _noise(volume: Volume, amount: float, generator: np.random.Generator):
    noise_DHW = generator.standard_normal(volume.array_DHW.shape, dtype=np.float32)
    return volume.array_DHW + np.float32(amount) * noise_DHW, volume.valid


def _relative_noise(volume: Volume, amount: float, generator: np.random.Generator):
    return _noise(volume, amount * volume.range, generator)


def _blur(volume: Volume, amount: float, generator: np.random.Generator):
    from scipy.ndimage import gaussian_filter

    sigma = [amount / FWHM / spacing for spacing in volume.spacing_mm]
    return _over_data(volume, lambda array: gaussian_filter(array, sigma, mode="nearest")), volume.valid


def _resolution(volume: Volume, amount: float, generator: np.random.Generator):
    """Voxels averaged until none is shorter than ``amount``, then interpolated back; longer sides stay."""
    import torch
    from torch.nn.functional import interpolate

    shape = volume.array_DHW.shape
    coarse = [max(1, round(n * min(1.0, s / amount))) for n, s in zip(shape, volume.spacing_mm, strict=True)]

    def there_and_back(array: np.ndarray) -> np.ndarray:
        given = torch.from_numpy(np.ascontiguousarray(array))[None, None]
        fewer = interpolate(given, size=coarse, mode="area")
        return interpolate(fewer, size=shape, mode="trilinear", align_corners=False)[0, 0].numpy()

    return (volume.array_DHW if coarse == list(shape) else _over_data(volume, there_and_back)), volume.valid


def _bias_field(volume: Volume, amount: float, generator: np.random.Generator):
    """The exponential of a polynomial of degree 3 with coefficients in [−amount, amount] (as in MONAI and NiftyNet).

    The polynomial is of Legendre's kind over the volume, without its constant.
    """
    degree = 3
    drawn = generator.uniform(-1.0, 1.0, (degree + 1,) * 3)
    order = np.add.outer(np.add.outer(np.arange(degree + 1), np.arange(degree + 1)), np.arange(degree + 1))
    coefficients = amount * np.where((order > 0) & (order <= degree), drawn, 0.0)
    z_D, y_H, x_W = (np.linspace(-1.0, 1.0, n) if n > 1 else np.zeros(1) for n in volume.array_DHW.shape)
    gain_DHW = np.exp(np.polynomial.legendre.leggrid3d(z_D, y_H, x_W, coefficients)).astype(np.float32)
    return volume.array_DHW * gain_DHW, volume.valid


def _missing_slices(volume: Volume, amount: float, generator: np.random.Generator):
    """Slices along the axis of the longest voxels hold no data; at least one stays."""
    axis = int(np.argmax(volume.spacing_mm))
    count = volume.array_DHW.shape[axis]
    lost = generator.permutation(count)[: min(count - 1, round(amount * count))]
    shape = [1, 1, 1]
    shape[axis] = count
    there = np.ones(count, dtype=bool)
    there[lost] = False
    valid = np.broadcast_to(there.reshape(shape), volume.array_DHW.shape)
    return volume.array_DHW, valid.copy() if volume.valid is None else valid & volume.valid


def _shift(volume: Volume, amount: float, generator: np.random.Generator):
    return volume.array_DHW + np.float32(amount), volume.valid


def _scaling(volume: Volume, amount: float, generator: np.random.Generator):
    return volume.array_DHW * np.float32(amount), volume.valid


def _over_data(volume: Volume, smooth: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """A linear smoothing that takes nothing from where there is no data (normalised convolution)."""
    if volume.valid is None:
        return smooth(volume.array_DHW)
    weight = smooth(volume.valid.astype(np.float32))
    held = smooth(np.where(volume.valid, volume.array_DHW, np.float32(0)))
    return np.where(volume.valid, held / np.maximum(weight, 1e-6), volume.array_DHW)


ALL = frozenset({"CT", "MR", "PT"})
CORRUPTIONS: dict[str, Corruption] = {
    "noise": Corruption(frozenset({"CT"}), "HU", _noise),
    "relative_noise": Corruption(frozenset({"MR", "PT"}), "share of the range", _relative_noise),
    "blur": Corruption(ALL, "mm FWHM", _blur),
    "resolution": Corruption(ALL, "mm", _resolution),
    "bias_field": Corruption(frozenset({"MR"}), "largest coefficient", _bias_field),
    "missing_slices": Corruption(ALL, "share", _missing_slices),
    "shift": Corruption(frozenset({"CT"}), "HU", _shift),
    "scaling": Corruption(frozenset({"MR", "PT"}), "factor", _scaling),
}
"""By the names in ``Robustness.Config.strengths``."""
