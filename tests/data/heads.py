"""Made-up heads with a texture of their own, and rows that look like them."""

import numpy as np
from scipy.ndimage import gaussian_filter, map_coordinates

from medseg_ssl.data.appearance import appearance
from tests.data.small_archive import scan_row


def head(seed, shape=(40, 44, 36)):
    """An ellipsoid of soft texture (about 300) in air (about 0); every seed has the same outline."""
    rng = np.random.default_rng(seed)
    texture = gaussian_filter(rng.normal(0, 1, (40, 44, 36)), 2.0, mode="wrap")
    texture = 300 + 60 * texture / texture.std()
    grid = np.meshgrid(*((np.arange(n) + 0.5) / n for n in shape), indexing="ij")
    inside = sum((g - 0.5) ** 2 for g in grid) < 0.2
    places = [g * n - 0.5 for g, n in zip(grid, texture.shape, strict=True)]
    values = map_coordinates(texture, places, order=3, mode="nearest")
    return np.where(inside, values, 2.0).astype(np.float32)


def seen(
    key, volume, *, subject=None, modality="MR", contrast="", spacing_mm=(1.0, 1.0, 1.0), content=None, **more
):
    """A row with the appearance of ``volume``; ``content`` is its content hash, the key where None."""
    row = scan_row(key, volume.shape, subject=subject or key, modality=modality, spacing_mm=spacing_mm)
    update = {"appearance": appearance(volume, None, spacing_mm), "contrast": contrast}
    return row.model_copy(update={**update, "content_hash": content or key, **more})
