"""How the phantom's bodies look in CT, MR and FDG-PET: tissue parameters, blur, each modality's noise."""

from __future__ import annotations

import numpy as np

from medseg_ssl.data.phantom_body import TISSUES, Waves
from medseg_ssl.types import TripleMm

_FWHM = 2.3548
"""Full width at half maximum in standard deviations."""

HU: dict[str, tuple[float, float]] = {
    "air": (-1000, 0), "fat": (-100, 6), "muscle": (54, 4), "viscera": (-40, 15), "bone": (320, 50),
    "lung": (-800, 40), "bowel": (40, 15), "bladder": (8, 5), "liver": (56, 6), "spleen": (50, 5),
    "kidney": (36, 5), "stomach": (5, 10), "aorta": (44, 4), "lesion": (30, 8),
}  # fmt: skip
"""Mean and spread between subjects, without contrast agent."""
ENHANCEMENT_HU = {
    "liver": 30, "spleen": 85, "kidney": 160, "aorta": 230, "muscle": 8, "lesion": 15, "bowel": 25,
    "viscera": 5,
}  # fmt: skip
"""What a full dose of contrast agent adds in a late arterial phase; scans differ in dose."""

RELAXATION: dict[str, tuple[float, float, float]] = {
    "air": (0.0, 1000, 50), "fat": (0.95, 300, 70), "muscle": (0.80, 1000, 42), "viscera": (0.85, 550, 70),
    "bone": (0.45, 600, 45), "lung": (0.12, 1200, 40), "bowel": (0.85, 1050, 95), "bladder": (1.0, 3200, 900),
    "liver": (0.80, 610, 48), "spleen": (0.85, 1020, 75), "kidney": (0.85, 1000, 85),
    "stomach": (0.88, 1150, 80), "aorta": (0.75, 1400, 55), "lesion": (0.88, 1100, 95),
}  # fmt: skip
"""Proton density, T1 and T2 in milliseconds, about as at 1.5 T."""
SEQUENCES = {"T1w": (520.0, 12.0), "T2w": (3800.0, 85.0)}
"""Repetition and echo time in milliseconds."""

SUV: dict[str, tuple[float, float]] = {
    "air": (0.0, 0.0), "fat": (0.35, 0.15), "muscle": (0.75, 0.15), "viscera": (0.7, 0.2), "bone": (1.1, 0.2),
    "lung": (0.45, 0.15), "bowel": (1.8, 0.45), "bladder": (11.0, 0.5), "liver": (2.3, 0.15),
    "spleen": (1.9, 0.15), "kidney": (3.0, 0.3), "stomach": (1.9, 0.35), "aorta": (1.7, 0.15),
    "lesion": (6.0, 0.3),
}  # fmt: skip
"""Median and logarithmic spread between subjects."""


def ct(tissue_DHW: np.ndarray, spacing_mm: TripleMm, generator: np.random.Generator) -> np.ndarray:
    """A CT in HU, int16: a random dose of contrast agent, reconstruction blur, correlated noise."""
    dose = generator.uniform(0.35, 1.0)
    table = np.array([generator.normal(*HU[t]) + dose * ENHANCEMENT_HU.get(t, 0.0) for t in TISSUES])
    image = _texture(tissue_DHW, table, spacing_mm, generator, relative=0.0, absolute=7.0)
    image = _blur(image, spacing_mm, fwhm_mm=4.0)
    noise = _blur(generator.standard_normal(image.shape, dtype=np.float32), spacing_mm, fwhm_mm=4.5)
    image += noise * (generator.uniform(8.0, 16.0) / noise.std())
    return np.rint(image.clip(-1024, 3071)).astype(np.int16)


def mr(
    tissue_DHW: np.ndarray, spacing_mm: TripleMm, generator: np.random.Generator, *, sequence: str
) -> np.ndarray:
    """A spin-echo MR in arbitrary units, int16: bias field, Rician noise, a gain of its own.

    Args:
        tissue_DHW: tissue of each voxel.
        spacing_mm: voxel size (D, H, W).
        generator: source of this scan's randomness.
        sequence: a key of ``SEQUENCES``.
    """
    repetition, echo = SEQUENCES[sequence]
    table = []
    for name in TISSUES:
        density, t1, t2 = RELAXATION[name]
        t1, t2 = t1 * np.exp(generator.normal(0, 0.07)), t2 * np.exp(generator.normal(0, 0.07))
        table.append(density * (1 - np.exp(-repetition / t1)) * np.exp(-echo / t2))
    image = _texture(tissue_DHW, np.array(table), spacing_mm, generator, relative=0.07, absolute=0.0)
    image = _blur(image, spacing_mm, fwhm_mm=3.5)
    image *= np.exp(_field(generator, tissue_DHW, spacing_mm, rms=0.22, wavelength_mm=(250.0, 500.0)))
    sigma = 0.045 * float(image[image > 0.05].mean())
    real, imaginary = (sigma * generator.standard_normal(image.shape, dtype=np.float32) for _ in range(2))
    magnitude = np.hypot(image + real, imaginary)
    gain = 1000.0 * np.exp(generator.normal(0.0, 0.4))
    return np.rint((magnitude * gain).clip(0, 32767)).astype(np.int16)


def fdg_pet(tissue_DHW: np.ndarray, spacing_mm: TripleMm, generator: np.random.Generator) -> np.ndarray:
    """An FDG-PET in SUV, float32: uptake, a point spread of 5 mm, the noise of counting."""
    uptake = [median * np.exp(generator.normal(0.0, spread)) for median, spread in (SUV[t] for t in TISSUES)]
    image = _texture(tissue_DHW, np.array(uptake), spacing_mm, generator, relative=0.10, absolute=0.0)
    image = _blur(image, spacing_mm, fwhm_mm=5.0).clip(0.0)
    counts_per_suv = generator.uniform(25.0, 60.0) * float(np.prod(spacing_mm)) / 64.0
    # scattered and random coincidences make a little signal in air
    return (generator.poisson((image + 0.02) * counts_per_suv) / counts_per_suv).astype(np.float32)


def _texture(
    tissue_DHW: np.ndarray,
    table: np.ndarray,
    spacing_mm: TripleMm,
    generator: np.random.Generator,
    *,
    relative: float,
    absolute: float,
) -> np.ndarray:
    """Values of the tissues with slow changes inside them."""
    image = table.astype(np.float32)[tissue_DHW]
    change = _field(generator, tissue_DHW, spacing_mm, rms=1.0, wavelength_mm=(25.0, 70.0))
    return image * (1 + np.float32(relative) * change) + np.float32(absolute) * change * (tissue_DHW > 0)


def _field(
    generator: np.random.Generator,
    like_DHW: np.ndarray,
    spacing_mm: TripleMm,
    *,
    rms: float,
    wavelength_mm: tuple[float, float],
) -> np.ndarray:
    waves = Waves.draw(generator, rms=rms, wavelength_mm=wavelength_mm, components=1)
    d, h, w = like_DHW.shape
    return waves.on_grid(np.diag([*spacing_mm, 1.0]), (d, h, w))[0]


def _blur(image: np.ndarray, spacing_mm: TripleMm, *, fwhm_mm: float) -> np.ndarray:
    from scipy.ndimage import gaussian_filter

    return gaussian_filter(image, [fwhm_mm / _FWHM / s for s in spacing_mm], mode="nearest")
