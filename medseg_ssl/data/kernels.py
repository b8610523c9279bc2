"""Compiled loops that cut a crop out of a box of stored voxels: copy, axis-aligned and general trilinear.

Every loop works on the int16 voxels of the archive and writes normalised intensities, validity and foreground
in one pass, computing only the voxels of the crop. numba is a heavy dependency; it is here because at 160³ a
rotated crop takes 30 ms with it and 230 ms with ``grid_sample`` or ``scipy.ndimage.affine_transform`` (one
core), and cutting a crop is what the loader spends its time on. This module takes about a second to import:
import it where it is used.

``line`` arguments are (low, high, gain, shift, threshold) in stored units: intensity = clip(v, low, high) ·
gain + shift; a voxel is foreground when v > threshold. Matrices map a crop index (d, h, w, 1) to an index of
the box. A point counts as inside up to half a voxel beyond the centres of the outermost voxels.
"""

from __future__ import annotations

import os

import numba
import numpy as np

from medseg_ssl.data.store import NO_DATA
from medseg_ssl.types import UNKNOWN_LABEL

_HOLE = np.int16(NO_DATA)
_UNKNOWN = np.uint8(UNKNOWN_LABEL)


def _compiled(function):
    # the cache cannot be written where neither the package nor the user's cache folder can (a read-only
    # container)
    options = {"nogil": True, "fastmath": True, "error_model": "numpy"}
    try:
        return numba.njit(cache=not os.environ.get("MEDSEG_NO_KERNEL_CACHE"), **options)(function)
    except RuntimeError:
        return numba.njit(**options)(function)


@_compiled
def copy_image(box, start, flip, line, image, valid, foreground):
    """Crop whose voxels are voxels of the box: index i is box index start + i, or start - i where flipped.

    Args:
        box: int16 (Z, Y, X), C-contiguous.
        start: int64 (3,), box index of crop index 0; may lie outside.
        flip: bool (3,).
        line: float32 (5,), see the module.
        image: float32 (D, H, W), written.
        valid: bool (D, H, W), written.
        foreground: bool (D, H, W), written.
    """
    depth, height, width = image.shape
    first, last = _span(start[2], flip[2], width, box.shape[2])
    begin = start[2] - last + 1 if flip[2] else start[2] + first
    turned = np.empty(last - first, np.int16)
    for d in range(depth):
        z = start[0] - d if flip[0] else start[0] + d
        for h in range(height):
            y = start[1] - h if flip[1] else start[1] + h
            row, row_valid, row_body = image[d, h], valid[d, h], foreground[d, h]
            if z < 0 or z >= box.shape[0] or y < 0 or y >= box.shape[1] or first == last:
                _clear(row, row_valid, row_body, 0, 0)
                continue
            source = box[z, y, begin : begin + last - first]
            if flip[2]:
                _reverse(source, turned)
                source = turned
            _finish_stored(source, line, row[first:last], row_valid[first:last], row_body[first:last])
            _clear(row, row_valid, row_body, first, last)


@_compiled
def copy_label(box, start, flip, label):
    """Label crop as ``copy_image`` cuts it; ``UNKNOWN_LABEL`` outside the box."""
    depth, height, width = label.shape
    first, last = _span(start[2], flip[2], width, box.shape[2])
    begin = start[2] - last + 1 if flip[2] else start[2] + first
    for d in range(depth):
        z = start[0] - d if flip[0] else start[0] + d
        for h in range(height):
            y = start[1] - h if flip[1] else start[1] + h
            row = label[d, h]
            if z < 0 or z >= box.shape[0] or y < 0 or y >= box.shape[1] or first == last:
                row[:] = _UNKNOWN
                continue
            row[:first] = _UNKNOWN
            row[last:] = _UNKNOWN
            source = box[z, y, begin : begin + last - first]
            if flip[2]:
                _reverse(source, row[first:last])
            else:
                row[first:last] = source


@_compiled
def scale_image(box, holes, scale, origin, line, image, valid, foreground):
    """Crop whose axes run along the axes of the box: crop index i is box index scale · i + origin, per axis.

    Blends two planes, then two rows, then two voxels, so a voxel costs about three operations and not eight
    loads. A voxel is valid when every voxel it is blended from is.

    Args:
        box: int16 (Z, Y, X), at least 2 voxels per axis.
        holes: whether the box holds voxels without data.
        scale: float64 (3,), negative where flipped.
        origin: float64 (3,).
        line: float32 (5,).
        image: float32 (D, H, W), written.
        valid: bool (D, H, W), written.
        foreground: bool (D, H, W), written.
    """
    depth, height, width = image.shape
    ys, xs = box.shape[1], box.shape[2]
    z_index, z_part, z_inside = _axis(depth, scale[0], origin[0], box.shape[0])
    y_index, y_part, y_inside = _axis(height, scale[1], origin[1], ys)
    x_index, x_part, x_inside = _axis(width, scale[2], origin[2], xs)
    first, last = _inside_span(x_inside)
    x_index, x_part = x_index[first:last], x_part[first:last]
    plane = np.empty((ys, xs), np.float32)
    lowest = np.empty((ys, xs), np.int16)
    blend = np.empty(xs, np.float32)
    least = np.empty(xs, np.int16)
    value = np.empty(last - first, np.float32)
    known = np.ones(last - first, np.bool_)
    for d in range(depth):
        if z_inside[d]:
            for y in range(ys):
                near, far = box[z_index[d], y], box[z_index[d] + 1, y]
                _blend_stored(near, far, z_part[d], plane[y])
                if holes:
                    _least(near, far, lowest[y])
        for h in range(height):
            row, row_valid, row_body = image[d, h], valid[d, h], foreground[d, h]
            if not (z_inside[d] and y_inside[h]) or first == last:
                _clear(row, row_valid, row_body, 0, 0)
                continue
            y = y_index[h]
            _blend(plane[y], plane[y + 1], y_part[h], blend)
            for w in range(value.size):
                x = x_index[w]
                value[w] = blend[x] + (blend[x + np.uint64(1)] - blend[x]) * x_part[w]
            if holes:
                _least(lowest[y], lowest[y + 1], least)
                for w in range(value.size):
                    x = x_index[w]
                    known[w] = (least[x] != _HOLE) & (least[x + np.uint64(1)] != _HOLE)
            _finish(value, known, line, row[first:last], row_valid[first:last], row_body[first:last])
            _clear(row, row_valid, row_body, first, last)


@_compiled
def affine_image(box, holes, matrix, line, image, valid, foreground):
    """Crop under any affine map, trilinear; a voxel is valid when all eight neighbours are.

    Args:
        box: int16 (Z, Y, X), at least 2 voxels per axis.
        holes: whether the box holds voxels without data.
        matrix: float64 (3, 4), crop index to box index.
        line: float32 (5,).
        image: float32 (D, H, W), written.
        valid: bool (D, H, W), written.
        foreground: bool (D, H, W), written.
    """
    depth, height, width = image.shape
    flat = box.ravel()
    steps = np.uint64(box.shape[2]), np.uint64(box.shape[1] * box.shape[2])
    value = np.empty(width, np.float32)
    known = np.ones(width, np.bool_)
    at = np.empty(width, np.int64)
    block = np.empty(width, np.int64)
    parts = np.empty((3, width), np.float32)
    corner = np.empty((8, width), np.int16)
    for d in range(depth):
        for h in range(height):
            row, row_valid, row_body = image[d, h], valid[d, h], foreground[d, h]
            first, last, base = _row_span(matrix, d, h, width, box.shape)
            count = last - first
            # three loops, of which the first and the last are vectorised, take half the time of one
            _points(box.shape, matrix, base, first, at[:count], block, parts)
            _gather(flat, at[:count], steps, corner)
            _blend_corners(corner, parts, value[:count])
            if holes:
                _known_corners(corner, known[:count])
            _finish(
                value[:count],
                known[:count],
                line,
                row[first:last],
                row_valid[first:last],
                row_body[first:last],
            )
            _clear(row, row_valid, row_body, first, last)


@_compiled
def _points(shape, matrix, base, first, at, block, parts):
    # along a row: flat index of the lowest of a point's eight neighbours, its block (see _even_blocks), and the
    # shares of the upper neighbours
    block_row = (shape[2] + 15) >> 4
    block_plane = block_row * ((shape[1] + 7) >> 3)
    z_top, y_top, x_top = np.float32(shape[0] - 1), np.float32(shape[1] - 1), np.float32(shape[2] - 1)
    z_most, y_most, x_most = np.float32(shape[0] - 2), np.float32(shape[1] - 2), np.float32(shape[2] - 2)
    z_slope, y_slope, x_slope = np.float32(matrix[0, 2]), np.float32(matrix[1, 2]), np.float32(matrix[2, 2])
    z_zero, y_zero, x_zero = base
    rows, planes = shape[2], shape[1] * shape[2]
    z_part, y_part, x_part = parts[0], parts[1], parts[2]
    nothing = np.float32(0)
    for i in range(at.size):
        step = np.float32(first + i)
        z = min(max(z_zero + z_slope * step, nothing), z_top)
        y = min(max(y_zero + y_slope * step, nothing), y_top)
        x = min(max(x_zero + x_slope * step, nothing), x_top)
        zi = np.int32(min(z, z_most))
        yi = np.int32(min(y, y_most))
        xi = np.int32(min(x, x_most))
        z_part[i] = z - np.float32(zi)
        y_part[i] = y - np.float32(yi)
        x_part[i] = x - np.float32(xi)
        at[i] = zi * planes + yi * rows + xi
        block[i] = (zi >> 3) * block_plane + (yi >> 3) * block_row + (xi >> 4)


@_compiled
def _gather(flat, at, steps, corner):
    # the eight neighbours of every point; unsigned indices spare numba's test for negative ones
    rows, planes = steps
    one = np.uint64(1)
    a, b, c, d = corner[0], corner[1], corner[2], corner[3]
    e, f, g, h = corner[4], corner[5], corner[6], corner[7]
    for i in range(at.size):
        low = np.uint64(at[i])
        up = low + planes
        a[i] = flat[low]
        b[i] = flat[low + one]
        c[i] = flat[low + rows]
        d[i] = flat[low + rows + one]
        e[i] = flat[up]
        f[i] = flat[up + one]
        g[i] = flat[up + rows]
        h[i] = flat[up + rows + one]


@_compiled
def _blend_corners(corner, parts, value):
    a, b, c, d = corner[0], corner[1], corner[2], corner[3]
    e, f, g, h = corner[4], corner[5], corner[6], corner[7]
    z_part, y_part, x_part = parts[0], parts[1], parts[2]
    for i in range(value.size):
        x = x_part[i]
        p = np.float32(a[i]) + (np.float32(b[i]) - np.float32(a[i])) * x
        q = np.float32(c[i]) + (np.float32(d[i]) - np.float32(c[i])) * x
        r = np.float32(e[i]) + (np.float32(f[i]) - np.float32(e[i])) * x
        s = np.float32(g[i]) + (np.float32(h[i]) - np.float32(g[i])) * x
        p += (q - p) * y_part[i]
        r += (s - r) * y_part[i]
        value[i] = p + (r - p) * z_part[i]


@_compiled
def _known_corners(corner, known):
    a, b, c, d = corner[0], corner[1], corner[2], corner[3]
    e, f, g, h = corner[4], corner[5], corner[6], corner[7]
    for i in range(known.size):
        lowest = min(min(min(a[i], b[i]), min(c[i], d[i])), min(min(e[i], f[i]), min(g[i], h[i])))
        known[i] = lowest != _HOLE


@_compiled
def affine_label(box, matrix, label):
    """Label under any affine map: the class of the largest trilinear weight; unknown outside the box."""
    depth, height, width = label.shape
    flat = box.ravel()
    even = _even_blocks(box).ravel()
    rows, planes = np.uint64(box.shape[2]), np.uint64(box.shape[1] * box.shape[2])
    one = np.uint64(1)
    at = np.empty(width, np.int64)
    block = np.empty(width, np.int64)
    parts = np.empty((3, width), np.float32)
    corner = np.empty(8, np.uint8)
    for d in range(depth):
        for h in range(height):
            row = label[d, h]
            first, last, base = _row_span(matrix, d, h, width, box.shape)
            row[:first] = _UNKNOWN
            row[last:] = _UNKNOWN
            _points(box.shape, matrix, base, first, at[: last - first], block, parts)
            for i in range(last - first):
                whole = even[np.uint64(block[i])]
                if whole >= 0:
                    row[first + i] = whole
                    continue
                low = np.uint64(at[i])
                up = low + planes
                corner[0], corner[1] = flat[low], flat[low + one]
                corner[2], corner[3] = flat[low + rows], flat[low + rows + one]
                corner[4], corner[5] = flat[up], flat[up + one]
                corner[6], corner[7] = flat[up + rows], flat[up + rows + one]
                row[first + i] = _heaviest(corner, parts[0, i], parts[1, i], parts[2, i])


@_compiled
def _even_blocks(box):
    # per block of 8 x 8 x 16 voxels and the neighbours above: its class where it holds one only, else -1; most of a
    # label does, and one look here saves eight there
    counts = ((box.shape[0] + 7) >> 3, (box.shape[1] + 7) >> 3, (box.shape[2] + 15) >> 4)
    even = np.empty(counts, np.int16)
    for i in range(counts[0]):
        for j in range(counts[1]):
            for k in range(counts[2]):
                first = box[i << 3, j << 3, k << 4]
                same = True
                last = min((k << 4) + 17, box.shape[2])
                for z in range(i << 3, min((i << 3) + 9, box.shape[0])):
                    for y in range(j << 3, min((j << 3) + 9, box.shape[1])):
                        same &= _all_equal(box[z, y, k << 4 : last], first)
                    if not same:
                        break
                even[i, j, k] = np.int16(first) if same else np.int16(-1)
    return even


@_compiled
def _all_equal(row, value):
    different = np.uint8(0)
    for i in range(row.size):
        different |= row[i] ^ value
    return different == 0


@_compiled
def _heaviest(corner, z_part, y_part, x_part):
    # class with the largest summed trilinear weight among eight corners; ties go to the corner met first
    best = corner[0]
    other = np.uint8(0)
    for i in range(1, 8):
        other |= corner[i] ^ best
    if other == 0:
        return best
    most = np.float32(-1)
    for i in range(8):
        total = np.float32(0)
        for j in range(8):
            if corner[j] == corner[i]:
                in_z = z_part if j & 4 else np.float32(1) - z_part
                in_y = y_part if j & 2 else np.float32(1) - y_part
                in_x = x_part if j & 1 else np.float32(1) - x_part
                total += in_z * in_y * in_x
        if total > most:
            most = total
            best = corner[i]
            if most >= np.float32(0.5):
                break
    return best


@_compiled
def _finish_stored(source, line, row, row_valid, row_body):
    # normalise a row of stored voxels; three short loops, since one long one is not vectorised
    low, high, gain, shift, threshold = line[0], line[1], line[2], line[3], line[4]
    for i in range(row.size):
        value = np.float32(source[i])
        row[i] = (min(max(value, low), high) * gain + shift) * np.float32(source[i] != _HOLE)
    for i in range(row.size):
        row_valid[i] = source[i] != _HOLE
    for i in range(row.size):
        row_body[i] = (np.float32(source[i]) > threshold) & (source[i] != _HOLE)


@_compiled
def _finish(value, known, line, row, row_valid, row_body):
    # the same for interpolated values
    low, high, gain, shift, threshold = line[0], line[1], line[2], line[3], line[4]
    for i in range(row.size):
        row[i] = (min(max(value[i], low), high) * gain + shift) * np.float32(known[i])
    for i in range(row.size):
        row_valid[i] = known[i]
    for i in range(row.size):
        row_body[i] = (value[i] > threshold) & known[i]


@_compiled
def _blend_stored(near, far, part, out):
    for i in range(out.size):
        out[i] = np.float32(near[i]) + (np.float32(far[i]) - np.float32(near[i])) * part


@_compiled
def _blend(near, far, part, out):
    for i in range(out.size):
        out[i] = near[i] + (far[i] - near[i]) * part


@_compiled
def _least(near, far, out):
    for i in range(out.size):
        out[i] = min(near[i], far[i])


@_compiled
def _reverse(source, out):
    for i in range(out.size):
        out[i] = source[out.size - 1 - i]


@_compiled
def _clear(row, row_valid, row_body, first, last):
    # everything of a row outside [first, last) is no data
    row[:first] = 0
    row[last:] = 0
    row_valid[:first] = False
    row_valid[last:] = False
    row_body[:first] = False
    row_body[last:] = False


@_compiled
def _span(start, flip, count, size):
    # crop indices [first, last) whose box index lies in [0, size)
    if flip:
        first, last = start - size + 1, start + 1
    else:
        first, last = -start, size - start
    first = min(max(first, 0), count)
    return first, min(max(last, first), count)


@_compiled
def _axis(count, scale, origin, size):
    # neighbour below, share of the neighbour above, and whether the point lies in the box, per crop index
    index = np.empty(count, np.uint64)
    part = np.empty(count, np.float32)
    inside = np.empty(count, np.bool_)
    for i in range(count):
        point = scale * i + origin
        inside[i] = point >= -0.5 and point <= size - 0.5
        point = min(max(point, 0.0), size - 1.0)
        below = min(int(point), size - 2)
        index[i] = below
        part[i] = point - below
    return index, part, inside


@_compiled
def _inside_span(inside):
    first = 0
    while first < inside.size and not inside[first]:
        first += 1
    last = inside.size
    while last > first and not inside[last - 1]:
        last -= 1
    return first, last


@_compiled
def _row_span(matrix, d, h, width, shape):
    # crop indices [first, last) of a row that lie in the box, and the box coordinates of the row's first
    # voxel
    low = 0.0
    high = width - 1.0
    for axis in range(3):
        base = matrix[axis, 0] * d + matrix[axis, 1] * h + matrix[axis, 3]
        slope = matrix[axis, 2]
        top = shape[axis] - 0.5
        if abs(slope) < 1e-9:
            if base < -0.5 or base > top:
                high = -1.0
        else:
            near, far = (-0.5 - base) / slope, (top - base) / slope
            low = max(low, min(near, far))
            high = min(high, max(near, far))
    first = int(np.ceil(low))
    last = int(np.floor(high)) + 1
    first = min(first, width)
    base = (
        np.float32(matrix[0, 0] * d + matrix[0, 1] * h + matrix[0, 3]),
        np.float32(matrix[1, 0] * d + matrix[1, 1] * h + matrix[1, 3]),
        np.float32(matrix[2, 0] * d + matrix[2, 1] * h + matrix[2, 3]),
    )
    return first, max(min(last, width), first), base


@_compiled
def blur(volume, z_taps, y_taps, x_taps, out):
    """Separable convolution with symmetric taps (centre first), edges replicated.

    A blurred volume of 160³ takes 7 ms where three ``conv3d`` take 270 ms and three matrix products 52 ms.

    Args:
        volume: float32 (D, H, W), contiguous.
        z_taps: float32, weight of the voxel itself, of its neighbours, of theirs, …
        y_taps: the same along H.
        x_taps: the same along W.
        out: float32 (D, H, W), written; not ``volume``.
    """
    depth, height, width = volume.shape
    plane = np.empty((height, width), np.float32)
    margin = x_taps.size - 1
    padded = np.empty(width + 2 * margin, np.float32)
    middle = padded[margin : margin + width]
    for d in range(depth):
        _weighted(volume[d].ravel(), z_taps[0], plane.ravel(), True)
        for tap in range(1, z_taps.size):
            _weighted(volume[max(d - tap, 0)].ravel(), z_taps[tap], plane.ravel(), False)
            _weighted(volume[min(d + tap, depth - 1)].ravel(), z_taps[tap], plane.ravel(), False)
        for h in range(height):
            _weighted(plane[h], y_taps[0], middle, True)
            for tap in range(1, y_taps.size):
                _weighted(plane[max(h - tap, 0)], y_taps[tap], middle, False)
                _weighted(plane[min(h + tap, height - 1)], y_taps[tap], middle, False)
            padded[:margin] = middle[0]
            padded[margin + width :] = middle[width - 1]
            _weighted(middle, x_taps[0], out[d, h], True)
            for tap in range(1, x_taps.size):
                _weighted(padded[margin - tap : margin - tap + width], x_taps[tap], out[d, h], False)
                _weighted(padded[margin + tap : margin + tap + width], x_taps[tap], out[d, h], False)


@_compiled
def _weighted(source, weight, out, fresh):
    if fresh:
        for i in range(out.size):
            out[i] = source[i] * weight
    else:
        for i in range(out.size):
            out[i] += source[i] * weight
