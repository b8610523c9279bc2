"""What can go wrong with a scan, in physical units and at a stated strength.

Graded common corruptions (arXiv 1903.12261), for scans: each is a pure function of the scan, the strength and the seed.
MONAI's transforms do the work; from here come physical units (mm, HU, shares of the scan's range) and that nothing is
blurred in from where there is no data. Missing slices are our own, MONAI has none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

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
    from monai.transforms.intensity.array import RandGaussianNoise

    noise = RandGaussianNoise(prob=1.0, mean=0.0, std=amount, sample_std=False)
    return _applied(noise, volume.array_DHW, generator), volume.valid


def _relative_noise(volume: Volume, amount: float, generator: np.random.Generator):
    return _noise(volume, amount * volume.range, generator)


def _blur(volume: Volume, amount: float, generator: np.random.Generator):
    from monai.transforms.intensity.array import GaussianSmooth

    smooth = GaussianSmooth([amount / FWHM / spacing for spacing in volume.spacing_mm], approx="sampled")
    return _over_data(volume, lambda array_DHW: _applied(smooth, array_DHW)), volume.valid


def _resolution(volume: Volume, amount: float, generator: np.random.Generator):
    """Voxels averaged until none is shorter than ``amount``, then interpolated back; longer sides stay."""
    from monai.transforms.compose import Compose
    from monai.transforms.spatial.array import Resize

    shape = volume.array_DHW.shape
    coarse = [max(1, round(n * min(1.0, s / amount))) for n, s in zip(shape, volume.spacing_mm, strict=True)]
    if coarse == list(shape):
        return volume.array_DHW, volume.valid
    there_and_back = Compose([Resize(coarse, mode="area"), Resize(shape, mode="trilinear")])
    return _over_data(volume, lambda array_DHW: _applied(there_and_back, array_DHW)), volume.valid


def _bias_field(volume: Volume, amount: float, generator: np.random.Generator):
    """The exponential of a polynomial of degree 3 with coefficients in [−amount, amount].

    Of Legendre's kind over the volume; with its constant, a factor that an intensity policy for MR takes out.
    """
    from monai.transforms.intensity.array import RandBiasField

    field = RandBiasField(prob=1.0, degree=3, coeff_range=(-amount, amount))
    return _applied(field, volume.array_DHW, generator), volume.valid


def _missing_slices(volume: Volume, amount: float, generator: np.random.Generator):
    """Slices along the axis of the longest voxels are lost; at least one stays.

    They are filled by linear interpolation between their kept neighbours, as a stack with gaps is resampled to even
    slices; beyond the outermost kept slice that one is repeated. What is filled counts as data: where there is none, a
    predictor answers background whatever the network would say, and the score would be of that rule.
    """
    axis = int(np.argmax(volume.spacing_mm))
    count = volume.array_DHW.shape[axis]
    lost = generator.permutation(count)[: min(count - 1, round(amount * count))]
    kept = np.setdiff1d(np.arange(count), lost)
    place = np.interp(np.arange(count), kept, np.arange(len(kept)))
    lower, upper = kept[np.floor(place).astype(int)], kept[np.ceil(place).astype(int)]
    shape = [1, 1, 1]
    shape[axis] = count
    share = (place - np.floor(place)).astype(np.float32).reshape(shape)
    valid = np.ones(volume.array_DHW.shape, dtype=bool) if volume.valid is None else volume.valid
    # a neighbour without data gives nothing, as in ``_over_data``
    near, far = (1 - share) * valid.take(lower, axis=axis), share * valid.take(upper, axis=axis)
    held = near * volume.array_DHW.take(lower, axis=axis) + far * volume.array_DHW.take(upper, axis=axis)
    filled = near + far > 0
    array_DHW = np.where(filled, held / np.where(filled, near + far, 1), volume.array_DHW)
    return array_DHW, None if volume.valid is None else filled


def _shift(volume: Volume, amount: float, generator: np.random.Generator):
    from monai.transforms.intensity.array import ShiftIntensity

    return _applied(ShiftIntensity(amount), volume.array_DHW), volume.valid


def _scaling(volume: Volume, amount: float, generator: np.random.Generator):
    from monai.transforms.intensity.array import ScaleIntensity

    return _applied(ScaleIntensity(None, None, factor=amount - 1.0), volume.array_DHW), volume.valid


def _over_data(volume: Volume, smooth: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """A linear smoothing that takes nothing from where there is no data, nor from beyond the volume.

    Normalised convolution (Knutsson and Westin 1993).
    """
    valid = np.ones(volume.array_DHW.shape, dtype=bool) if volume.valid is None else volume.valid
    weight = smooth(valid.astype(np.float32))
    held = smooth(np.where(valid, volume.array_DHW, np.float32(0)))
    return np.where(valid, held / np.maximum(weight, 1e-6), volume.array_DHW)


def _applied(
    transform: Any, array_DHW: np.ndarray, generator: np.random.Generator | None = None
) -> np.ndarray:
    """A transform of MONAI's on one volume; a random one draws from ``generator``."""
    if generator is not None:
        transform.set_random_state(seed=int(generator.integers(2**32)))
    return np.asarray(transform(np.ascontiguousarray(array_DHW)[None]))[0].astype(np.float32, copy=False)


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
