"""What a scan looks like, in a few hundred bytes: to find copies that another grid or number format disguises.

The fingerprint holds the texture of the whole field of view at five to ten half waves across it. Block means over 32³
boxes of the field of view (so the spacing does not matter) are scaled between their 1st and 99th percentile (so a
linear change of intensities does not matter); a soft mask of what is brighter than air takes the outline away, which
subjects registered to one template share; what is left goes through a cosine transform, whose middle frequencies are
kept as signed bytes. The volume is the canonical one, so the file's orientation does not matter either.

Two fingerprints are compared by the cosine of their angle. Measured (LOG.md, 2026-11-21), copies resampled to 1.3 times
the spacing or stored anew lie above 0.95, different subjects below, also those on one template. **Not covered**: a
crop or a padded scan (another field of view), a volume whose header is wrong, a warped one, another contrast.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from medseg_ssl.data.manifest import ScanRow
from medseg_ssl.types import TripleMm

SIMILARITY = 0.95
"""Cosine from which two scans count as copies of one: chosen on half of the real subjects, held on the others."""
_VERSION = "1"
_GRID = 32
_BAND = (5.0, 10.0)
_TILT = 1.5
"""Exponent that lifts high frequencies against the fall of natural images' spectra."""
_AIR, _TISSUE = 0.1, 0.4
"""Scaled intensity that counts as outside and as wholly inside."""
_BYTE = 40.0
"""Root mean square of the stored bytes: three of it fit."""
_EXTENT_TOLERANCE = 0.1
_EXACT = 25_000_000
"""Comparisons up to which every pair is looked at."""
_BANDS, _BITS, _EXTENT_STEP, _WINDOW = 64, 24, 0.4, 256
_CHUNK = 65_536


class Look(NamedTuple):
    """A fingerprint taken apart: extents (D, H, W) of the field of view in mm, int8 numbers and their length."""

    extent_mm: TripleMm
    code: np.ndarray
    length: float


class NearPair(NamedTuple):
    """Indices of two scans that look alike (``a`` in the first sequence, ``b`` in the second) and their cosine."""

    a: int
    b: int
    similarity: float


def appearance(volume_DHW: np.ndarray, valid_DHW: np.ndarray | None, spacing_mm: TripleMm) -> str:
    """The fingerprint of a scan as text, about 800 characters; free of salt, names and paths.

    Args:
        volume_DHW: the canonical volume as it stands in its file, any linear scale.
        valid_DHW: bool, False = no data, which counts as the darkest value; None = all valid.
        spacing_mm: voxel size (D, H, W).

    Returns:
        ``VERSION:DxHxW:BASE64`` with the field of view in mm; ``""`` where there is nothing to see (a flat volume).
    """
    volume = np.asarray(volume_DHW, dtype=np.float32)
    if valid_DHW is not None and not valid_DHW.all():
        if not valid_DHW.any():
            return ""
        volume = np.where(valid_DHW, volume, volume.min(where=valid_DHW, initial=np.inf))
    blocks = volume
    for axis in (2, 1, 0):  # the longest product first, on contiguous memory
        blocks = np.moveaxis(np.moveaxis(blocks, axis, -1) @ _block_means(volume.shape[axis]).T, -1, axis)
    vector = _texture(blocks.astype(np.float64))
    if vector is None:
        return ""
    code = np.clip(np.rint(vector * (_BYTE * np.sqrt(vector.size))), -127, 127).astype(np.int8)
    extent = "x".join(f"{n * mm:.1f}" for n, mm in zip(volume.shape, spacing_mm, strict=True))
    return f"{_VERSION}:{extent}:{base64.b64encode(code.tobytes()).decode('ascii')}"


def look(text: str) -> Look | None:
    """Take a fingerprint apart; None for ``""``, one of another version, or one that is damaged."""
    parts = text.split(":")
    if len(parts) != 3 or parts[0] != _VERSION:
        return None
    try:
        d, h, w = (float(part) for part in parts[1].split("x"))
        code = np.frombuffer(base64.b64decode(parts[2], validate=True), dtype=np.int8)
    except (ValueError, binascii.Error):
        return None
    length = float(np.linalg.norm(code.astype(np.float32)))
    if code.size != _selection().size or not length or min(d, h, w) <= 0:
        return None
    return Look((d, h, w), code, length)


def similarity(first: str, second: str) -> float:
    """Cosine of two fingerprints, -1 to 1; 0 where one is missing or their fields of view differ by over 10 %."""
    a, b = look(first), look(second)
    if a is None or b is None or not _same_extent(np.log([a.extent_mm]), np.log([b.extent_mm])).all():
        return 0.0
    return float(a.code.astype(np.float64) @ b.code.astype(np.float64)) / (a.length * b.length)


def near_pairs(
    scans: Sequence[ScanRow], others: Sequence[ScanRow] | None = None, *, threshold: float = SIMILARITY
) -> list[NearPair]:
    """Pairs of scans of one modality that look alike, sorted by index; every scan that has a like one is in a pair.

    Where several rows have equal fingerprints the first of them stands for all.

    Few scans are compared each with each. Beyond 25 million comparisons the cost must not grow with the square of
    the archive, so scans are sorted into buckets 64 times over: a bucket has one modality, one cell of physical
    extents (steps of 0.4 in the logarithm, shifted at random each time, so that two scans on either side of a border
    meet the next time) and one pattern of signs in 24 numbers of the fingerprint, drawn anew each
    time; scans are compared with at most 256 neighbours in their bucket. A million scans then take at most
    64 · 256 comparisons each, in practice far fewer. The price: a copy at cosine 0.98 is missed once in 30 000, one
    at the threshold of 0.95 about once in 40.

    Args:
        scans: rows with their ``appearance``; rows without one match nothing.
        others: compare ``scans`` with these; None compares ``scans`` among themselves (a < b).
        threshold: least cosine.
    """
    first, second = _Looks(scans), None if others is None else _Looks(others)
    found: list[NearPair] = []
    for modality in sorted(first.modalities & (first if second is None else second).modalities):
        a = first.of(modality)
        b = a if second is None else second.of(modality)
        small = a.number * b.number <= _EXACT
        pairs = _every(a, b, threshold) if small else _bucketed(a, b, same=second is None)
        found += _verified(a, b, pairs, threshold=threshold, same=second is None)
    return sorted(set(found))


# -- the fingerprint -----------------------------------------------------------------------------------------


def _texture(blocks: np.ndarray) -> np.ndarray | None:
    """Unit vector of the middle frequencies inside the soft mask; None where nothing is there."""
    from scipy.fft import dctn

    low, high = np.percentile(blocks, (1, 99))
    if not np.isfinite((low, high)).all() or high - low <= 1e-6 * max(abs(low), abs(high), 1e-30):
        return None
    scaled = np.clip((blocks - low) / (high - low), 0, 1)
    inside = np.clip((scaled - _AIR) / (_TISSUE - _AIR), 0, 1)
    mass = inside.sum()
    texture = inside * (scaled - (inside * scaled).sum() / mass)
    spread = np.sqrt(np.square(texture).sum() / mass)
    if spread <= 1e-6:
        return None
    # a few bright voxels must not be all there is to see
    waves: np.ndarray = dctn(np.clip(texture / spread, -2, 2), norm="ortho")  # pyright: ignore[reportAssignmentType]
    chosen = _selection()
    vector = waves.ravel()[chosen] * _weights()
    length = float(np.linalg.norm(vector))
    return vector / length if length > 1e-6 else None


@lru_cache(maxsize=64)
def _block_means(voxels: int) -> np.ndarray:
    """float32 (32, voxels): the mean over each 32nd of the axis; a voxel on a border counts in part."""
    edges = np.linspace(0, voxels, _GRID + 1)
    index = np.arange(voxels)
    overlap = np.minimum(edges[1:, None], index + 1) - np.maximum(edges[:-1, None], index)
    return (np.clip(overlap, 0, None) * (_GRID / voxels)).astype(np.float32)


@lru_cache(maxsize=1)
def _frequencies() -> np.ndarray:
    k = np.arange(_GRID, dtype=np.float64)
    return np.sqrt(k[:, None, None] ** 2 + k[None, :, None] ** 2 + k[None, None, :] ** 2).ravel()


@lru_cache(maxsize=1)
def _selection() -> np.ndarray:
    return np.flatnonzero((_frequencies() >= _BAND[0]) & (_frequencies() <= _BAND[1]))


@lru_cache(maxsize=1)
def _weights() -> np.ndarray:
    return _frequencies()[_selection()] ** _TILT


# -- the search ----------------------------------------------------------------------------------------------


class _Members(NamedTuple):
    """Scans of one modality with different fingerprints; bytes, since a million of them must fit.

    Attributes:
        codes: int8 (N, numbers).
        lengths: of each code.
        extents: logarithm of the extents in mm, (N, 3).
        owners: the rows that have each fingerprint, in rising order.
    """

    codes: np.ndarray
    lengths: np.ndarray
    extents: np.ndarray
    owners: list[list[int]]

    def unit(self, chosen: slice | np.ndarray) -> np.ndarray:
        """float32 unit vectors of some members."""
        return self.codes[chosen].astype(np.float32) / self.lengths[chosen, None]

    @property
    def number(self) -> int:
        return len(self.owners)


class _Looks:
    """Fingerprints of rows by modality; equal ones only once, or a thousand copies would make a million pairs."""

    def __init__(self, rows: Sequence[ScanRow]) -> None:
        self._owners: dict[str, dict[str, list[int]]] = {}
        for index, row in enumerate(rows):
            if row.appearance:
                self._owners.setdefault(row.modality, {}).setdefault(row.appearance, []).append(index)

    @property
    def modalities(self) -> set[str]:
        return set(self._owners)

    def of(self, modality: str) -> _Members:
        looks = [(look(text), owners) for text, owners in self._owners[modality].items()]
        kept = [(found, owners) for found, owners in looks if found is not None]
        codes = np.array([found.code for found, _ in kept], dtype=np.int8).reshape(-1, _selection().size)
        lengths = np.array([found.length for found, _ in kept], dtype=np.float32)
        extents = np.log(np.array([found.extent_mm for found, _ in kept], dtype=np.float64).reshape(-1, 3))
        return _Members(codes, lengths, extents, [owners for _, owners in kept])


def _same_extent(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.asarray((np.abs(a - b) <= _EXTENT_TOLERANCE).all(axis=-1))


def _every(a: _Members, b: _Members, threshold: float) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Every pair above the threshold, by products of blocks."""
    others = b.unit(slice(None)).T
    for start in range(0, a.number, 1024):
        i, j = np.nonzero(a.unit(slice(start, start + 1024)) @ others >= threshold - 1e-4)
        yield i + start, j


def _bucketed(a: _Members, b: _Members, *, same: bool) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs that share a bucket in one of the rounds."""
    generator = np.random.default_rng(0)
    for _ in range(_BANDS):
        chosen = generator.choice(a.codes.shape[1], _BITS, replace=False)
        shift = generator.random(3)
        keys = [_keys(members, chosen, shift) for members in ((a,) if same else (a, b))]
        order = np.argsort(keys[-1], kind="stable")
        ordered = keys[-1][order]
        # among themselves each scan looks at those behind it, so that no pair comes twice
        asking = ordered if same else keys[0]
        start = np.arange(1, len(order) + 1) if same else np.searchsorted(ordered, asking, "left")
        number = np.clip(np.searchsorted(ordered, asking, "right") - start, 0, _WINDOW)
        who = order if same else np.arange(a.number)
        for first in range(0, len(who), _CHUNK // 16):
            part = slice(first, first + _CHUNK // 16)
            times = number[part]
            place = np.repeat(start[part] - (np.cumsum(times) - times), times) + np.arange(times.sum())
            yield np.repeat(who[part], times), order[place]


def _keys(members: _Members, chosen: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """int64 bucket of each scan: signs of the chosen numbers, and the cell of its extents."""
    signs = (members.codes[:, chosen] > 0) @ (np.int64(1) << np.arange(_BITS, dtype=np.int64))
    # extents from 0.01 mm to 100 m lie within 12 bits per axis
    cells = np.clip(np.floor(members.extents / _EXTENT_STEP + shift) + 64, 0, 255).astype(np.int64)
    return signs | cells @ (np.int64(1) << (_BITS + 8 * np.arange(3, dtype=np.int64)))


def _verified(
    a: _Members,
    b: _Members,
    pairs: Iterator[tuple[np.ndarray, np.ndarray]],
    *,
    threshold: float,
    same: bool,
) -> Iterator[NearPair]:
    """The pairs of rows whose fingerprints are alike enough, those of equal fingerprints included."""
    for candidates_a, candidates_b in pairs:
        for first in range(0, len(candidates_a), _CHUNK):
            i, j = candidates_a[first : first + _CHUNK], candidates_b[first : first + _CHUNK]
            fits = _same_extent(a.extents[i], b.extents[j])
            i, j = i[fits], j[fits]
            cosine = np.einsum("ij,ij->i", a.unit(i), b.unit(j))
            for x, y, value in zip(i, j, cosine, strict=True):
                if value >= threshold and not (same and x == y):
                    yield from _of_rows(a.owners[x], b.owners[y], float(value), same=same)
    if same:
        for owners in a.owners:
            yield from (NearPair(owners[0], other, 1.0) for other in owners[1:])


def _of_rows(a: Sequence[int], b: Sequence[int], value: float, *, same: bool) -> Iterator[NearPair]:
    """Of rows with equal fingerprints the first stands for the others, so that pairs stay as many as rows."""
    if same and a[0] > b[0]:
        a, b = b, a
    value = round(value, 4)
    yield from (NearPair(a[0], y, value) for y in b) if same else (NearPair(x, b[0], value) for x in a)
