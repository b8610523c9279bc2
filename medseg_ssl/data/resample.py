"""Resampling by affines, voxel centre to voxel centre.

Where the axes of the two grids are parallel (the rule in an archive), interpolation is separable: one small
matrix per axis holds low-pass, spline prefilter and weights, and a volume takes three matrix products. Other
pairs of grids go through ``scipy.ndimage.affine_transform``.

Before downsampling by a factor f an axis is smoothed with a Gaussian of sigma (f - 1) / 2 source voxels, the
convention of scikit-image's ``resize``; as there, a cubic result stays within the range of its source. Beyond
the outermost voxel centres the volume continues with its edge values, up to the voxels' borders; further out
lies nothing.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from medseg_ssl.types import Triple, TripleMm

_PARALLEL_TOLERANCE = 1e-3
"""Voxels by which a grid may deviate from parallel axes over its whole length and still count as parallel."""
_EDGE = 1e-4
_PAD = 12
"""Edge extension of the spline prefilter in voxels, as in scipy's ``nearest`` mode."""
_ROWS = 32
ORDERS = (0, 1, 3)


def spacing_of(affine_44: np.ndarray) -> TripleMm:
    """Voxel size (D, H, W) in mm of an affine."""
    d, h, w = np.linalg.norm(np.asarray(affine_44)[:3, :3], axis=0)
    return float(d), float(h), float(w)


def grid_for_spacing(shape: Triple, affine_44: np.ndarray, spacing_mm: TripleMm) -> tuple[Triple, np.ndarray]:
    """The grid of another voxel size over the same field of view: same directions, same centre.

    Args:
        shape: voxels (D, H, W) of the given grid.
        affine_44: its affine, (D, H, W) index to RAS mm.
        spacing_mm: wanted voxel size (D, H, W), kept exactly; the shape is rounded to it.

    Returns:
        Shape and float64 affine of the new grid.
    """
    affine = np.asarray(affine_44, dtype=np.float64)
    old, new = np.array(spacing_of(affine)), np.array(spacing_mm, dtype=np.float64)
    if not (new > 0).all():
        raise ValueError(f"spacing must be positive, got {spacing_mm}")
    if np.allclose(old, new, rtol=1e-5, atol=0):
        return (shape[0], shape[1], shape[2]), affine.copy()
    # the small subtraction keeps 2.5 voxels from becoming 3 or 2 by the last bit
    target = np.maximum(1, np.floor(np.array(shape) * old / new + 0.5 - 1e-6)).astype(int)
    out = affine.copy()
    out[:3, :3] = affine[:3, :3] * (new / old)
    centre = affine[:3, :3] @ ((np.array(shape) - 1) / 2) + affine[:3, 3]
    out[:3, 3] = centre - out[:3, :3] @ ((target - 1) / 2)
    return (int(target[0]), int(target[1]), int(target[2])), out


def same_grid(
    shape_a: Triple,
    affine_a: np.ndarray,
    shape_b: Triple,
    affine_b: np.ndarray,
    *,
    tolerance_voxels: float = 0.05,
) -> bool:
    """Whether two grids coincide: equal shapes and no corner further apart than a share of a voxel."""
    if tuple(shape_a) != tuple(shape_b):
        return False
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in shape_a], indexing="ij")).reshape(3, -1)
    corners = np.vstack([corners, np.ones(corners.shape[1])])
    apart = np.linalg.norm(((np.asarray(affine_a) - np.asarray(affine_b)) @ corners)[:3], axis=0)
    return bool(apart.max() <= tolerance_voxels * min(spacing_of(affine_a)))


def resample(
    volume_DHW: np.ndarray,
    affine_44: np.ndarray,
    to_shape: Triple,
    to_affine_44: np.ndarray,
    order: int = 3,
    fill: float = 0.0,
    *,
    antialias: bool = True,
) -> np.ndarray:
    """Interpolate a volume on another grid.

    Args:
        volume_DHW: values, every one valid (``resample_valid`` otherwise).
        affine_44: (D, H, W, 1) index of the volume to RAS mm.
        to_shape: voxels (D, H, W) of the target grid.
        to_affine_44: affine of the target grid.
        order: 0 nearest, 1 linear, 3 cubic B-spline.
        fill: value outside the volume's field of view.
        antialias: low-pass before downsampling (orders 1 and 3).

    Returns:
        float32 (D, H, W) of ``to_shape``.

    Raises:
        ValueError: another order.
    """
    return resample_valid(
        volume_DHW, None, affine_44, to_shape, to_affine_44, order, fill, antialias=antialias
    )[0]


def resample_valid(
    volume_DHW: np.ndarray,
    valid_DHW: np.ndarray | None,
    affine_44: np.ndarray,
    to_shape: Triple,
    to_affine_44: np.ndarray,
    order: int = 3,
    fill: float = 0.0,
    *,
    antialias: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Interpolate a volume that has voxels without data.

    A target voxel is valid where at least half of its (linear) weight lies on valid voxels. Values of invalid
    voxels never enter: next to them the interpolation is linear over the valid weight, elsewhere of
    ``order``.

    Args:
        volume_DHW: values.
        valid_DHW: bool, False = no data; None = all valid.
        affine_44: (D, H, W, 1) index of the volume to RAS mm.
        to_shape: voxels (D, H, W) of the target grid.
        to_affine_44: affine of the target grid.
        order: 0 nearest, 1 linear, 3 cubic B-spline.
        fill: value of invalid target voxels.
        antialias: low-pass before downsampling (orders 1 and 3).

    Returns:
        float32 volume and bool validity, both of ``to_shape``.

    Raises:
        ValueError: another order.
    """
    if order not in ORDERS:
        raise ValueError(f"interpolation order must be one of {ORDERS}, got {order}")
    volume = np.ascontiguousarray(volume_DHW, dtype=np.float32)
    grid = _Mapping(volume.shape, affine_44, to_shape, to_affine_44)
    if valid_DHW is None or valid_DHW.all():
        if grid.identity:
            return volume.copy(), np.ones(to_shape, dtype=bool)
        out, inside = grid.apply(volume, order=order, antialias=antialias), grid.inside()
    elif grid.identity:
        out, inside = volume.copy(), valid_DHW.astype(bool)
    else:
        out, inside = _normalised(volume, valid_DHW, grid, order=order, antialias=antialias)
    if order == 3 and not grid.identity:
        _clip_overshoot(out, volume, valid_DHW)
    if not inside.all():
        out[~inside] = fill
    return out, inside


def resample_label(
    label_DHW: np.ndarray,
    affine_44: np.ndarray,
    to_shape: Triple,
    to_affine_44: np.ndarray,
    *,
    antialias: bool = True,
    outside: int = 0,
) -> np.ndarray:
    """Interpolate a label map class by class: each voxel takes the class with the largest linear weight.

    A draw between background and a class goes to the class, one between classes to the smaller value.

    Args:
        label_DHW: uint8 classes.
        affine_44: (D, H, W, 1) index of the label map to RAS mm.
        to_shape: voxels (D, H, W) of the target grid.
        to_affine_44: affine of the target grid.
        antialias: low-pass before downsampling.
        outside: value outside the label's field of view.

    Returns:
        uint8 (D, H, W) of ``to_shape``.
    """
    label = np.ascontiguousarray(label_DHW, dtype=np.uint8)
    grid = _Mapping(label.shape, affine_44, to_shape, to_affine_44)
    if grid.identity:
        return label.copy()
    out = np.zeros(to_shape, dtype=np.uint8)
    best = np.zeros(to_shape, dtype=np.float32)
    total = np.zeros(to_shape, dtype=np.float32)
    # slice by slice, since bincount widens its input to 64 bits
    counts = sum(np.bincount(slab.ravel(), minlength=256) for slab in label)
    for value in np.flatnonzero(counts):
        if value == 0:
            continue
        region, weight = grid.apply_class(label == value, antialias=antialias)
        total[region] += weight
        better = weight > best[region]
        np.copyto(best[region], weight, where=better)
        np.copyto(out[region], np.uint8(value), where=better)
    # background has what is left of the weight; the margin gives a draw to the class
    total += best
    np.copyto(out, np.uint8(0), where=total < 1 - 1e-5)
    inside = grid.inside()
    if not inside.all():
        out[~inside] = outside
    return out


def _clip_overshoot(out: np.ndarray, volume: np.ndarray, valid: np.ndarray | None) -> None:
    """Keep a cubic spline, which rings at edges, within the range of the values it came from."""
    where = True if valid is None else valid
    low = float(volume.min(where=where, initial=np.inf))
    high = float(volume.max(where=where, initial=-np.inf))
    if low <= high:
        np.clip(out, low, high, out=out)


def _normalised(
    volume: np.ndarray, valid: np.ndarray, grid: _Mapping, *, order: int, antialias: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Values and validity where some voxels hold no data."""
    share = grid.apply(valid.astype(np.float32), order=min(order, 1), antialias=antialias)
    inside = grid.inside() & (share >= 0.5 - _EDGE)
    if order == 0:
        return grid.apply(volume, order=0, antialias=False), inside
    known = grid.apply(np.where(valid, volume, np.float32(0)), order=1, antialias=antialias)
    partial = inside & (share < 1 - 1e-3)
    out = known if order == 1 else grid.apply(_extend(volume, valid), order=3, antialias=antialias)
    out[partial] = known[partial] / share[partial]
    return out, inside


def _extend(volume: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Continue valid values into invalid voxels: the nearest one along W, then H, then D.

    The cubic prefilter looks far; without this a no-data value would ring into the valid side.
    """
    out, known = volume, valid
    for axis in (2, 1, 0):
        if known.all():
            break
        # the axis goes last, so that a voxel's neighbour along it is its neighbour in memory
        values = np.moveaxis(out, axis, -1).copy()
        good = np.ascontiguousarray(np.moveaxis(known, axis, -1))
        n = good.shape[-1]
        index = np.arange(n, dtype=np.int32)
        before = np.maximum.accumulate(np.where(good, index, np.int32(-n)), axis=-1)
        after = np.minimum.accumulate(np.where(good, index, np.int32(2 * n))[..., ::-1], axis=-1)[..., ::-1]
        closer = np.where(index - before <= after - index, before, after).ravel()
        found = (closer >= 0) & (closer < n)
        wanted = np.flatnonzero(found & ~good.ravel())
        flat = values.reshape(-1)
        flat[wanted] = flat[wanted - wanted % n + closer[wanted]]
        out = np.moveaxis(values, -1, axis)
        known = np.moveaxis(found.reshape(good.shape), -1, axis)
    return np.ascontiguousarray(out)


class _Mapping:
    """Target index → source index, and interpolation along it."""

    def __init__(
        self, shape: tuple[int, ...], affine: np.ndarray, to_shape: Triple, to_affine: np.ndarray
    ) -> None:
        relative = np.linalg.solve(np.asarray(affine, np.float64), np.asarray(to_affine, np.float64))
        self.matrix, self.offset = relative[:3, :3], relative[:3, 3]
        self.shape, self.to_shape = (shape[0], shape[1], shape[2]), (to_shape[0], to_shape[1], to_shape[2])
        self.source_axis = np.argmax(np.abs(self.matrix), axis=0)
        parallel = np.zeros((3, 3), dtype=bool)
        parallel[self.source_axis, range(3)] = True
        drift = np.where(parallel, 0.0, np.abs(self.matrix)) @ np.array(self.to_shape)
        self.separable = bool(len(set(self.source_axis.tolist())) == 3 and drift.max() < _PARALLEL_TOLERANCE)
        # a shift must be far below a voxel and a scale error must not add up over the volume
        still = np.abs(self.matrix - np.eye(3)) @ np.array(self.to_shape) + np.abs(self.offset)
        self.identity = bool(self.shape == self.to_shape and still.max() < _PARALLEL_TOLERANCE)

    def _axis(self, target_axis: int) -> tuple[int, float, float]:
        """Source axis, step and start (source voxels) of a target axis of separable grids."""
        axis = int(self.source_axis[target_axis])
        return axis, float(self.matrix[axis, target_axis]), float(self.offset[axis])

    def _matrices(self, order: int, antialias: bool) -> list[np.ndarray]:
        found = []
        for target_axis in range(3):
            axis, step, start = self._axis(target_axis)
            key = (self.shape[axis], self.to_shape[target_axis], round(step, 12), round(start, 9))
            found.append(axis_matrix(*key, order=order, antialias=antialias))
        return found

    def apply(self, volume: np.ndarray, *, order: int, antialias: bool) -> np.ndarray:
        """Interpolate; outside the source the edge continues."""
        if not self.separable:
            return self._general(volume, order=order, antialias=antialias)
        moved = volume.transpose(tuple(self.source_axis))
        return _products(np.ascontiguousarray(moved), self._matrices(order, antialias))

    def apply_class(self, chosen: np.ndarray, *, antialias: bool) -> tuple[tuple[slice, ...], np.ndarray]:
        """Linear weight of one class, with the region of the target it can reach."""
        if not self.separable:
            return (slice(None),) * 3, self._general(chosen.astype(np.float32), order=1, antialias=antialias)
        moved = chosen.transpose(tuple(self.source_axis))
        region, parts, cut = [], [], []
        for axis, matrix in enumerate(self._matrices(1, antialias)):
            others = tuple(a for a in range(3) if a != axis)
            taken = np.flatnonzero(moved.any(axis=others))
            source = slice(int(taken[0]), int(taken[-1]) + 1)
            reached = np.flatnonzero(matrix[:, source].any(axis=1))
            target = slice(int(reached[0]), int(reached[-1]) + 1) if len(reached) else slice(0, 0)
            region.append(target)
            cut.append(source)
            parts.append(matrix[target, source])
        return tuple(region), _products(np.ascontiguousarray(moved[tuple(cut)], dtype=np.float32), parts)

    def _general(self, volume: np.ndarray, *, order: int, antialias: bool) -> np.ndarray:
        from scipy import ndimage

        if antialias and order:
            # a target step's extent along each source axis; 1 for a pure rotation
            sigma = np.maximum(0.0, (np.linalg.norm(self.matrix, axis=1) - 1) / 2)
            if sigma.max() > 1e-6:
                volume = ndimage.gaussian_filter(volume, sigma, mode="nearest")
        return ndimage.affine_transform(
            volume,
            self.matrix,
            tuple(self.offset),  # pyright: ignore[reportArgumentType] -- scipy takes one per axis
            self.to_shape,
            output=np.float32,
            order=order,
            mode="nearest",
        )

    def inside(self) -> np.ndarray:
        """Bool (D, H, W): target voxels whose centre lies within the borders of the source's voxels."""
        out = np.ones(self.to_shape, dtype=bool)
        steps = [np.arange(n, dtype=np.float64) for n in self.to_shape]
        for axis, n in enumerate(self.shape):
            if self.separable:
                target = int(np.flatnonzero(self.source_axis == axis)[0])
                place = self.matrix[axis, target] * steps[target] + self.offset[axis]
                place = place.reshape([-1 if a == target else 1 for a in range(3)])
            else:
                d, h, w = (self.matrix[axis, a] * steps[a] for a in range(3))
                place = d[:, None, None] + h[:, None] + w + self.offset[axis]
            out &= (place >= -0.5 - _EDGE) & (place <= n - 0.5 + _EDGE)
        return out


def _products(volume: np.ndarray, matrices: list[np.ndarray]) -> np.ndarray:
    """Apply one matrix per axis, those that shrink the volume most first."""
    for axis in sorted(range(3), key=lambda a: matrices[a].shape[0] / matrices[a].shape[1]):
        matrix = matrices[axis]
        shape = [len(matrix) if a == axis else n for a, n in enumerate(volume.shape)]
        out = np.zeros(shape, dtype=np.float32)
        # the matrices are banded: a few rows at a time touch a short piece of the source only
        for first in range(0, len(matrix), _ROWS):
            rows = matrix[first : first + _ROWS]
            used = np.flatnonzero(rows.any(axis=0))
            if not len(used):
                continue
            source, target = slice(int(used[0]), int(used[-1]) + 1), slice(first, first + len(rows))
            part = np.ascontiguousarray(rows[:, source])
            if axis == 0:
                np.matmul(
                    part, volume[source].reshape(len(part.T), -1), out=out[target].reshape(len(part), -1)
                )
            elif axis == 1:
                np.matmul(part, volume[:, source], out=out[:, target])
            else:
                np.matmul(volume[:, :, source], part.T, out=out[:, :, target])
        volume = out
    return volume


@lru_cache(maxsize=64)
def axis_matrix(
    size: int, to_size: int, step: float, start: float, *, order: int, antialias: bool
) -> np.ndarray:
    """Interpolation along one axis as a float32 matrix (to_size, size).

    Args:
        size: source voxels.
        to_size: target voxels.
        step: source voxels per target voxel, negative for a flip.
        start: source index of target voxel 0.
        order: 0 nearest, 1 linear, 3 cubic B-spline with its prefilter.
        antialias: Gaussian of sigma (|step| - 1) / 2 source voxels first where it is positive.
    """
    from scipy import ndimage

    place = np.clip(start + step * np.arange(to_size), -_PAD + 2, size + _PAD - 3)
    if order == 0:
        matrix = np.zeros((to_size, size))
        matrix[np.arange(to_size), np.clip(np.floor(place + 0.5 + 1e-9), 0, size - 1).astype(int)] = 1.0
        return _frozen(matrix)
    signal = np.eye(size)
    sigma = (abs(step) - 1) / 2
    if antialias and sigma > 1e-6:
        signal = ndimage.gaussian_filter1d(signal, sigma, axis=0, mode="nearest")
    signal = np.pad(signal, ((_PAD, _PAD), (0, 0)), mode="edge")
    if order == 3:
        signal = ndimage.spline_filter1d(signal, order=3, axis=0, mode="mirror", output=np.float64)
    first = np.floor(place).astype(int)
    t = place - first
    if order == 1:
        weights = {0: 1 - t, 1: t}
    else:
        weights = {
            -1: (1 - t) ** 3 / 6,
            0: (4 - 6 * t**2 + 3 * t**3) / 6,
            1: (1 + 3 * t + 3 * t**2 - 3 * t**3) / 6,
            2: t**3 / 6,
        }
    out = np.zeros((to_size, size))
    for shift, weight in weights.items():
        out += weight[:, None] * signal[first + shift + _PAD]
    return _frozen(out)


def _frozen(matrix: np.ndarray) -> np.ndarray:
    # far tails of the spline prefilter are below float32's reach; without them the matrix is banded
    out = np.ascontiguousarray(np.where(np.abs(matrix) < 1e-8, 0, matrix), dtype=np.float32)
    out.flags.writeable = False
    return out
