"""Voxels of an archive on disk: blosc2 files of 64³ chunks, written whole or not at all.

These functions take the archive's folder and need no open archive, so worker processes call them directly.
Every file carries the recipe's hash and a stamp of its source, so that finished work is recognised and
skipped.
"""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from medseg_ssl.config import UserError
from medseg_ssl.data.manifest import ScanRow
from medseg_ssl.types import Triple

if TYPE_CHECKING:
    from medseg_ssl.data.recipe import Recipe

NO_DATA = -32768
"""Stored value of a voxel without data."""
_LARGEST = 32767
_CHUNK = 64
_BLOCK = 32
_STEPS_ACROSS_BODY = 8192
_LEAST_SUV = 50.0


class Quantised(NamedTuple):
    """A volume as stored: physical = stored · scale + offset, ``NO_DATA`` where invalid.

    ``clipped`` tells that extreme outliers were cut so that the body keeps its resolution.
    """

    stored: np.ndarray
    scale: float
    offset: float
    clipped: bool


def quantise(
    volume_DHW: np.ndarray, valid_DHW: np.ndarray | None, *, unit: str, integral: bool = False
) -> Quantised:
    """Store a volume as int16.

    HU and whole-numbered volumes within int16 keep scale 1 (exact where they are whole). Others get a step of
    a 8192th of the spread between the 0.5th and 99.5th percentile, so 0 stays 0, or a coarser one that covers
    the full range; where outliers would make it coarser than a 1024th of that spread they are clipped
    instead (SUV never below 50: most of a field of view is air, and lesions lie far above its spread).

    Args:
        volume_DHW: float32 physical values.
        valid_DHW: bool, False = no data; None = all valid.
        unit: ``HU``, ``SUV`` or ``raw``.
        integral: every valid value is a whole number.

    Raises:
        ValueError: no valid voxel.
    """
    if valid_DHW is not None and valid_DHW.all():
        valid_DHW = None
    values = volume_DHW if valid_DHW is None else volume_DHW[valid_DHW]
    if not values.size:
        raise ValueError("no valid voxel to store")
    low, high = float(values.min()), float(values.max())
    scale, offset, clipped = 1.0, 0.0, False
    if unit == "HU":
        clipped = low < -_LARGEST or high > _LARGEST
    elif not (integral and low >= -_LARGEST and high <= _LARGEST):
        p_low, p_high = np.percentile(values.ravel()[:: max(1, values.size // 1_000_000)], (0.5, 99.5))
        spread = float(p_high - p_low) or (high - low) or 1.0
        full = (high - low) / (2 * _LARGEST - 2)
        clipped = full > spread / 1024
        if clipped:
            top = float(p_high) + 4 * spread
            low, high = (
                max(low, float(p_low) - 4 * spread),
                min(high, max(top, _LEAST_SUV) if unit == "SUV" else top),
            )
            full = (high - low) / (2 * _LARGEST - 2)
        scale = max(full, spread / _STEPS_ACROSS_BODY)
        offset = 0.0 if max(abs(low), abs(high)) <= scale * _LARGEST else (low + high) / 2
    if (scale, offset) == (1.0, 0.0):
        stored = np.rint(volume_DHW)
    else:
        stored = np.subtract(volume_DHW, np.float32(offset))
        np.multiply(stored, np.float32(1 / scale), out=stored)
        np.rint(stored, out=stored)
    np.clip(stored, -_LARGEST, _LARGEST, out=stored)
    stored = stored.astype(np.int16)
    if valid_DHW is not None:
        stored[~valid_DHW] = NO_DATA
    return Quantised(stored, scale, offset, clipped)


def stamp_of(*files: Path | None) -> str:
    """What tells that source files are unchanged: size and time of change of each.

    Raises:
        UserError: a file is missing.
    """
    try:
        states = [file.stat() for file in files if file is not None]
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error
    return ";".join(f"{state.st_size}:{state.st_mtime_ns}" for state in states)


def write_volume(archive: Path, stored_DHW: np.ndarray, row: ScanRow, *, recipe: Recipe, stamp: str) -> Path:
    """Write a scan's voxels (int16, as ``quantise`` gives them) with its row.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    meta = {"recipe": recipe.voxel_hash(), "stamp": stamp, "row": row.model_dump_json()}
    return _write(
        Path(archive) / "volumes" / f"{row.key}.b2nd", stored_DHW.astype(np.int16, copy=False), meta
    )


def finished_scan(archive: Path, key: str, *, recipe: Recipe, stamp: str) -> ScanRow | None:
    """The row of a volume that is finished already.

    None where it is missing, damaged, or of another recipe or source file.
    """
    meta = _finished(Path(archive) / "volumes" / f"{key}.b2nd", recipe=recipe, stamp=stamp)
    return None if meta is None else ScanRow.model_validate_json(meta["row"])


def write_label(
    archive: Path,
    case: str,
    label_DHW: np.ndarray,
    *,
    original_DHW: np.ndarray,
    original_affine_44: np.ndarray,
    recipe: Recipe,
    stamp: str,
) -> None:
    """Write a case's label on the archive grid and on its own.

    Args:
        archive: folder of the archive.
        case: key of the case.
        label_DHW: uint8 on the archive grid of the case's first scan.
        original_DHW: uint8 on the label's own grid, canonical axes.
        original_affine_44: (D, H, W, 1) index of the latter to RAS mm.
        recipe: of the archive.
        stamp: ``stamp_of`` the source files.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    meta = {"recipe": recipe.voxel_hash(), "stamp": stamp}
    original = np.ascontiguousarray(original_DHW, dtype=np.uint8)
    own = {
        "affine_44": np.asarray(original_affine_44, dtype=np.float64).tolist(),
        "content_hash": hashlib.sha256(original.data).hexdigest(),
    }
    labels = Path(archive) / "labels"
    first = _write(labels / f"{case}.original.b2nd", original, {**meta, **own})
    second = labels / f"{case}.b2nd"
    if not (np.array_equal(original, label_DHW) and _linked(first, second)):
        _write(second, label_DHW.astype(np.uint8, copy=False), meta)


def finished_label(archive: Path, case: str, *, recipe: Recipe, stamp: str) -> bool:
    """Whether both files of a case's label are finished, of this recipe and these source files."""
    labels = Path(archive) / "labels"
    names = (f"{case}.original.b2nd", f"{case}.b2nd")
    return all(_finished(labels / name, recipe=recipe, stamp=stamp) is not None for name in names)


def label_hash(archive: Path, case: str) -> str:
    """Sha256 of a case's label map on its own grid.

    Raises:
        UserError: the file is missing or damaged.
    """
    path = Path(archive) / "labels" / f"{case}.original.b2nd"
    try:
        array = open_array(path)  # its metadata lives no longer than the array itself
        return str(array.schunk.vlmeta["content_hash"])
    except (KeyError, RuntimeError) as error:
        raise UserError(f"{path} is damaged; delete it and run prepare again") from error


def open_array(path: Path) -> Any:
    """Open a blosc2 file lazily, decompressing in the calling thread.

    Raises:
        UserError: missing or damaged.
    """
    import blosc2

    try:
        # a finished file never changes, so mapping it is safe, and faster than reading its pieces
        mapped: Any = None if os.name == "nt" else "r"
        return blosc2.open(str(path), mode="r", mmap_mode=mapped, dparams={"nthreads": 1})
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing from the archive; run prepare again") from error
    except (RuntimeError, OSError, ValueError) as error:
        raise UserError(f"{path} is damaged; delete it and run prepare again") from error


def read_box(array: Any, start: Triple, size: Triple, *, outside: int) -> np.ndarray:
    """Read [start, start + size); voxels beyond the array hold ``outside``."""
    low = [max(0, s) for s in start]
    high = [min(n, s + z) for n, s, z in zip(array.shape, start, size, strict=True)]
    if all(a == s and b == s + z for a, b, s, z in zip(low, high, start, size, strict=True)):
        return array[low[0] : high[0], low[1] : high[1], low[2] : high[2]]
    out = np.full(size, outside, dtype=array.dtype)
    if all(a < b for a, b in zip(low, high, strict=True)):
        place = tuple(slice(a - s, b - s) for a, b, s in zip(low, high, start, strict=True))
        out[place] = array[low[0] : high[0], low[1] : high[1], low[2] : high[2]]
    return out


def _write(path: Path, array: np.ndarray, meta: dict[str, Any]) -> Path:
    import blosc2

    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    chunks = tuple(min(_CHUNK, n) for n in array.shape)
    source: Any = np.ascontiguousarray(array)
    # shuffling single bytes gains nothing and costs time
    shuffle = blosc2.Filter.SHUFFLE if array.itemsize > 1 else blosc2.Filter.NOFILTER
    # made in memory: on disk every entry of metadata would write the file's trailer anew
    frame: Any = blosc2.asarray(
        source,
        chunks=chunks,
        blocks=tuple(min(_BLOCK, n) for n in chunks),
        contiguous=True,
        cparams=blosc2.CParams(
            codec=blosc2.Codec.LZ4,
            clevel=5,
            filters=[shuffle],
            nthreads=1,
            typesize=array.itemsize,
        ),
    )
    for name, value in meta.items():
        frame.schunk.vlmeta[name] = value
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(frame.to_cframe())
            # the rename marks a volume as finished, so its bytes must be on disk before
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        full = "; free some space and run prepare again" if error.errno == errno.ENOSPC else ""
        raise UserError(f"cannot write {path}: {error.strerror or error}{full}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _linked(file: Path, second: Path) -> bool:
    """Give a finished file a second name; False where the file system cannot."""
    temporary = second.with_name(f".{second.name}.{os.getpid()}.part")
    try:
        os.link(file, temporary)
        os.replace(temporary, second)
    except OSError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _finished(path: Path, *, recipe: Recipe, stamp: str) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        array = open_array(path)
        found = {name: array.schunk.vlmeta[name] for name in array.schunk.vlmeta}
    except (UserError, RuntimeError, OSError, ValueError):
        return None
    return found if (found.get("recipe"), found.get("stamp")) == (recipe.voxel_hash(), stamp) else None
