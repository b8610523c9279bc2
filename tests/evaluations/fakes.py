"""An archive in memory and networks whose answers are known."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from medseg_ssl.config import UserError
from medseg_ssl.data import intensity
from medseg_ssl.data.manifest import CaseRow, ScanRow, Split
from medseg_ssl.data.store import NO_DATA
from medseg_ssl.nets.encoder_file import Card

CT_POLICY = {"kind": "window", "hu_range": (-150.0, 150.0)}
POLICIES = {
    "CT": CT_POLICY,
    "MR": {"kind": "robust_zscore"},
    "PT": {"kind": "suv_window", "suv_range": (0.0, 20.0)},
}


def affine(spacing_mm=(1.0, 1.0, 1.0), origin=(0.0, 0.0, 0.0)):
    """(D, H, W) index to RAS mm: D is z, H is y, W is x."""
    matrix = np.zeros((4, 4))
    for axis, (ras, spacing) in enumerate(zip((2, 1, 0), spacing_mm, strict=True)):
        matrix[ras, axis] = spacing
    matrix[:3, 3], matrix[3, 3] = origin, 1.0
    return matrix


def card(**changes):
    plain = {
        "kind": "segmenter",
        "encoder": {"name": "none"},
        "classes": ("background", "bright"),
        "crop_size": (16, 16, 16),
        "intensity": POLICIES,
        "modalities": ("CT",),
        "objective": "fake",
    }
    return Card(**{**plain, **changes})


class Threshold(nn.Module):
    """Class 1 where channel 0 lies above a normalised value; remembers the shapes it saw."""

    def __init__(self, above=0.0, classes=2):
        super().__init__()
        self.above, self.classes, self.seen = above, classes, []

    def forward(self, image_BCDHW, spacing_mm_B3=None):
        self.seen.append((tuple(image_BCDHW.shape), spacing_mm_B3.clone()))
        value = 50 * (image_BCDHW[:, :1] - self.above)
        rest = torch.full_like(value, -1e4).expand(-1, self.classes - 2, -1, -1, -1)
        return torch.cat([-value, value, rest], dim=1)


class PooledEncoder(nn.Module):
    """Two levels; the deepest map holds the image itself and its square, so pooling gives mean and power."""

    channels = (1, 2)
    strides = ((1, 1, 1), (2, 2, 2))

    def forward(self, image_BCDHW, spacing_mm_B3=None):
        deep = nn.functional.avg_pool3d(image_BCDHW, 2)
        return [image_BCDHW, torch.cat([deep, deep**2], dim=1)]


class MemoryArchive:
    """Scans and labels as arrays, with the rows and the reading interface of ``data.archive.Archive``."""

    def __init__(self, classes=("background", "bright")):
        self.classes, self.fingerprint, self.path = tuple(classes), "f" * 64, None
        self.scans, self.cases, self.pairs = {}, {}, []
        self.volumes, self.labels = {}, {}
        self.splits = {}

    def limited(self, access):
        """Its cases hold their channels already."""
        return self

    def add_scan(
        self, key, array, *, subject, modality="CT", unit="HU", spacing=(1.0, 1.0, 1.0), valid=None, grid=None
    ):
        grid = affine(spacing) if grid is None else grid
        scale = 1.0 if unit == "HU" else max(float(np.abs(array).max()), 1.0) / 30000
        stored = np.rint(array / scale).astype(np.int16)
        if valid is not None:
            stored[~valid] = NO_DATA
        has_data = valid is None or valid.any()
        seen = array.astype(np.float32)
        statistics = intensity.statistics(seen, valid if has_data else None, modality=modality, unit=unit)
        body = intensity.foreground(
            seen, valid, modality, unit=unit, threshold=statistics.foreground_threshold
        )
        self.volumes[key] = stored
        self.scans[key] = ScanRow(
            key=key,
            subject=subject,
            study="",
            modality=modality,
            contrast="",
            unit=unit,
            shape=array.shape,
            spacing_mm=spacing,
            affine_44=tuple(tuple(float(v) for v in row) for row in grid),
            frame="",
            scale=scale,
            offset=0.0,
            content_hash=key,
            original_shape=array.shape,
            original_spacing_mm=spacing,
            foreground_box=intensity.foreground_box(body),
            statistics=statistics,
        )

    def add_case(self, case, scans, label=None, *, label_affine=None, known=()):
        first = self.scans[scans[0]]
        self.cases[case] = CaseRow(
            case=case,
            subject=first.subject,
            scans=tuple(scans),
            labeled=label is not None,
            known_classes=known or (True,) * len(self.classes) if label is not None else (),
        )
        if label is not None:
            self.labels[case] = (label, np.array(first.affine_44) if label_affine is None else label_affine)

    def set_split(self, *, train=(), development=(), test=(), name="default"):
        self.splits[name] = Split(name=name, seed=0, train=train, development=development, test=test)

    def split(self, name="default"):
        if name not in self.splits:
            raise UserError(f"no split named {name!r}")
        return self.splits[name]

    def read(self, key, start, size):
        out = np.full(size, NO_DATA, np.int16)
        volume = self.volumes[key]
        low = [max(0, s) for s in start]
        high = [max(a, min(n, s + c)) for a, n, s, c in zip(low, volume.shape, start, size, strict=True)]
        inner = tuple(slice(a - s, b - s) for a, b, s in zip(low, high, start, strict=True))
        out[inner] = volume[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
        return out

    def read_label(self, case, start, size):
        label, _ = self.labels[case]
        assert tuple(start) == (0, 0, 0)
        assert tuple(size) == label.shape
        return label

    def original_label(self, case):
        return self.labels[case]

    def original_spacing_mm(self, case):
        return tuple(float(v) for v in np.linalg.norm(self.labels[case][1][:3, :3], axis=0))


def bright_cube(shape, box, *, inside=100.0, outside=-100.0):
    """A CT volume that is bright in a box, with some texture so that it is never constant."""
    volume = np.full(shape, outside, np.float32)
    volume += np.arange(volume.size).reshape(shape) % 3
    volume[box] = inside
    return volume
