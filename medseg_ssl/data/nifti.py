"""NIfTI in and out: the only module that knows nibabel.

A volume enters as float32 in the canonical RAS+ axes, transposed to (D, H, W) = (z, y, x), with an affine
from (D, H, W) indices to RAS millimetres; oblique affines are kept. It leaves in the geometry of the file it
came from. Everything that is no 3D scan ends in ``BadScan`` with one reason.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medseg_ssl.config import UserError
from medseg_ssl.types import Triple, TripleMm

_LARGEST_VALUE = 1e18
"""No scanner writes larger ones, and squares of them overflow float32: they count as infinite."""
_SMALLEST_RANGE = 1e-15
"""Diffusion in m²/s is at 1e-9; squares of much smaller values vanish in float32."""
_MAX_NON_FINITE = 0.5
_HEADER_BYTES = 348
_GZIP_MAGIC = b"\x1f\x8b"
_GZIP_RATIO = 1032
"""The most that deflate can shrink."""
_MOST_INFLATED = 16 * 2**30
_PLAUSIBLE_MM = (0.002, 50.0)
"""Voxel sizes of scans, from microtomography to thick slices."""
_CERTAIN_MM = (0.1, 10.0)
"""Voxel sizes of clinical scans: numbers in this range are millimetres, whatever the header says of the unit."""


class BadScan(UserError):  # noqa: N818 -- it is a verdict on a file, listed in dropped.csv
    """A file that cannot be used as a scan or label.

    Attributes:
        reason: what is wrong, without the path.
    """

    def __init__(self, reason: str, path: Path | None = None) -> None:
        super().__init__(f"{path}: {reason}" if path is not None else reason)
        self.reason = reason


@dataclass(frozen=True, eq=False)
class OriginalGrid:
    """How the voxels lie in the file, enough to write an array back in the file's own geometry.

    Attributes:
        shape_ijk: voxels along the file's axes.
        affine_ijk_44: float64, file index (i, j, k, 1) to RAS millimetres.
        orientation: per file axis, the RAS axis it becomes and its direction (nibabel's 3x2 orientation).
        sform_code: NIfTI code of the sform, 0 for unknown.
        qform_code: NIfTI code of the qform, 0 for unknown.
        xyzt_units: NIfTI units byte.
        mm_per_unit: millimetres of the unit in which the file states its geometry.
    """

    shape_ijk: Triple
    affine_ijk_44: np.ndarray
    orientation: np.ndarray
    sform_code: int = 2
    qform_code: int = 0
    xyzt_units: int = 2
    mm_per_unit: float = 1.0

    @property
    def shape(self) -> Triple:
        """Voxels in (D, H, W)."""
        order = np.argsort(self.orientation[:, 0])
        i, j, k = (self.shape_ijk[int(axis)] for axis in order)
        return k, j, i

    @property
    def affine_44(self) -> np.ndarray:
        """float64, (D, H, W, 1) index of the canonical volume to RAS millimetres."""
        import nibabel as nib

        to_file = nib.orientations.inv_ornt_aff(self.orientation, self.shape_ijk)
        return (self.affine_ijk_44 @ to_file)[:, [2, 1, 0, 3]]

    def to_canonical(self, array_ijk: np.ndarray) -> np.ndarray:
        """View an array in file axes as (D, H, W)."""
        import nibabel as nib

        return nib.orientations.apply_orientation(array_ijk, self.orientation).transpose(2, 1, 0)

    def to_file(self, array_DHW: np.ndarray) -> np.ndarray:
        """View a (D, H, W) array in the file's own axes.

        Raises:
            ValueError: the array is not of this grid.
        """
        import nibabel as nib

        if array_DHW.shape != self.shape:
            raise ValueError(f"array of shape {array_DHW.shape} does not fit the original grid {self.shape}")
        canonical = np.array([[0, 1], [1, 1], [2, 1]])
        back = nib.orientations.ornt_transform(canonical, self.orientation)
        return nib.orientations.apply_orientation(array_DHW.transpose(2, 1, 0), back)


@dataclass(eq=False)
class Volume:
    """A scan or label map as read.

    Attributes:
        array: (D, H, W) of the canonical RAS+ volume, C order; float32 (uint8 for a label).
        affine_44: float64, (D, H, W, 1) index to RAS millimetres.
        spacing_mm: voxel size (D, H, W).
        original: how to write an array back in the file's geometry.
        no_data: bool (D, H, W), True where the file held NaN or an infinity (``array`` is 0 there); None
            without.
        quality: flags: ``non_finite``, ``no_orientation`` (the file states no sform or qform),
            ``single_slice``.
        integral: every value is a whole number within int16.
    """

    array: np.ndarray
    affine_44: np.ndarray
    spacing_mm: TripleMm
    original: OriginalGrid
    no_data: np.ndarray | None = None
    quality: tuple[str, ...] = ()
    integral: bool = False

    @property
    def valid(self) -> np.ndarray | None:
        """The complement of ``no_data``, None where everything is valid."""
        return None if self.no_data is None else ~self.no_data


@dataclass(frozen=True, eq=False)
class Geometry:
    """Grid of a file from its header alone; (D, H, W) order as in ``Volume``."""

    shape: Triple
    affine_44: np.ndarray
    spacing_mm: TripleMm


def is_nifti_name(path: Path) -> bool:
    """Whether a file name ends as a NIfTI file does (``.nii`` or ``.nii.gz``)."""
    return Path(path).name.lower().endswith((".nii", ".nii.gz"))


def nifti_stem(path: Path) -> str:
    """File name without ``.nii`` or ``.nii.gz``."""
    name = Path(path).name
    for ending in (".nii.gz", ".nii"):
        if name.lower().endswith(ending):
            return name[: -len(ending)]
    return name


def content_hash(array_DHW: np.ndarray) -> str:
    """Sha256 of a volume's voxels as little-endian float32 in C order (D, H, W)."""
    return hashlib.sha256(np.ascontiguousarray(array_DHW, dtype="<f4").data).hexdigest()


def read_geometry(path: Path, *, volume: int | None = None) -> Geometry:
    """Read a file's grid from its header, without its voxels; ``volume`` as in ``read_nifti``.

    Raises:
        BadScan: as ``read_nifti``, for what the header alone shows.
    """
    path = Path(path)
    image = _open(path, voxels=False)
    original = _original_grid(image, path, volume=volume)
    return Geometry(original.shape, original.affine_44, _spacing(original.affine_44))


def read_nifti(path: Path, *, volume: int | None = None, allow_constant: bool = False) -> Volume:
    """Read one scan as float32 in canonical axes, scaling applied.

    NaN and infinite voxels become no data (set to 0, listed in ``no_data`` and flagged).

    Args:
        path: ``.nii``, ``.nii.gz``, a NIfTI pair or MGH file.
        volume: which volume of a 4D file (Decathlon channels); None: the file must hold one.
        allow_constant: accept a volume whose voxels are all equal (prediction must; an archive must not).

    Raises:
        BadScan: missing, unreadable or truncated, not NIfTI, colour, complex, several volumes, fewer than
            three axes, an affine that is singular or not finite, no voxels, more than half of them not
            finite, or (unless allowed) all of them equal.
    """
    path = Path(path)
    image = _open(path, voxels=True)
    original = _original_grid(image, path, volume=volume)
    array_ijk = _voxels(image, original, path, volume=volume)
    return volume_of(
        array_ijk,
        original,
        flags=_header_flags(image, original),
        integral=array_ijk.dtype.kind in "iu",
        path=path,
        allow_constant=allow_constant,
    )


def volume_of(
    array_ijk: np.ndarray,
    original: OriginalGrid,
    *,
    valid_ijk: np.ndarray | None = None,
    flags: tuple[str, ...] = (),
    integral: bool = False,
    path: Path | None = None,
    allow_constant: bool = False,
) -> Volume:
    """A volume in canonical axes of voxels in the axes of a file; NaN and infinite voxels become no data.

    Args:
        array_ijk: voxels, scaling applied.
        original: their grid.
        valid_ijk: bool, False where the file says that there is no data; None: everywhere valid.
        flags: quality flags found so far.
        integral: the values are known to be whole numbers (otherwise it is looked at).
        path: for messages.
        allow_constant: accept a volume whose valid voxels are all equal.

    Raises:
        BadScan: more than half of the voxels not finite, none of them valid, or (unless allowed) all of them equal.
    """
    with np.errstate(over="ignore"):  # what float32 cannot hold is infinite, and told as such
        array = np.ascontiguousarray(original.to_canonical(array_ijk), dtype=np.float32)
    integral = integral or _is_integral(array)
    no_data = None
    if valid_ijk is not None:
        no_data = ~np.ascontiguousarray(original.to_canonical(valid_ijk))
        if no_data.all():
            raise BadScan("it holds no data: every voxel is padding", path)
    low, high = float(array.min()), float(array.max())
    if not (low > -_LARGEST_VALUE and high < _LARGEST_VALUE):
        broken = ~(np.abs(array) < _LARGEST_VALUE)
        share = float(broken.mean())
        if share > _MAX_NON_FINITE:
            raise BadScan(
                f"{share:.0%} of the voxels are NaN or infinite (at most {_MAX_NON_FINITE:.0%}); beyond "
                f"{_LARGEST_VALUE:.0e} they count as infinite",
                path,
            )
        no_data = broken if no_data is None else no_data | broken
        flags = (*flags, "non_finite")
    if no_data is not None:
        array[no_data] = 0.0
        data = array[~no_data]
        low, high = float(data.min()), float(data.max())
        integral = _is_integral(array)
    if low == high and not allow_constant:
        raise BadScan(f"empty: every voxel has the value {low:g}", path)
    if 0 < high - low < _SMALLEST_RANGE:
        raise BadScan(f"empty: its voxels differ by {high - low:.0e} at most", path)
    integral = integral and low >= -32767 and high <= 32767
    spacing_mm = _spacing(original.affine_44)
    return Volume(array, original.affine_44, spacing_mm, original, no_data, flags, integral)


def label_of(array_ijk: np.ndarray, original: OriginalGrid) -> Volume:
    """A label map in canonical axes of uint8 voxels in the axes of a file."""
    array = np.ascontiguousarray(original.to_canonical(array_ijk), dtype=np.uint8)
    return Volume(array, original.affine_44, _spacing(original.affine_44), original, None, (), True)


def grid_of(shape_ijk: Triple, affine_ijk_44: np.ndarray) -> OriginalGrid:
    """The grid of voxels that came in axes (i, j, k) with an affine to RAS mm, but from no NIfTI file."""
    import nibabel as nib

    return OriginalGrid(shape_ijk, affine_ijk_44, nib.orientations.io_orientation(affine_ijk_44))


def read_label(path: Path, *, volume: int | None = None) -> Volume:
    """Read one label map as uint8 in canonical axes; 255 means unknown (``types.UNKNOWN_LABEL``).

    Raises:
        BadScan: as ``read_nifti``; or a value that is not a whole number from 0 to 255 (the value is named).
    """
    path = Path(path)
    image = _open(path, voxels=True)
    original = _original_grid(image, path, volume=volume)
    array_ijk = _voxels(image, original, path, volume=volume)
    if array_ijk.dtype != np.uint8:
        if not np.isfinite(array_ijk).all():
            raise BadScan("a label map must hold whole numbers from 0 to 255, found NaN or an infinity", path)
        whole = np.rint(array_ijk)
        # a scaled label map (scl_slope) may miss the whole number by rounding
        wrong = (np.abs(array_ijk - whole) > 1e-3) | (whole < 0) | (whole > 255)
        if wrong.any():
            raise BadScan(
                f"a label map must hold whole numbers from 0 to 255, found {array_ijk[wrong].flat[0]:g}", path
            )
        array_ijk = whole
    array = np.ascontiguousarray(original.to_canonical(array_ijk), dtype=np.uint8)
    flags = _header_flags(image, original)
    return Volume(array, original.affine_44, _spacing(original.affine_44), original, None, flags, True)


def original_grid(shape_DHW: Triple, affine_44: np.ndarray) -> OriginalGrid:
    """The grid of a new file whose axes are the canonical ones, for arrays that came from no file."""
    import nibabel as nib

    affine_ijk = np.asarray(affine_44, dtype=np.float64)[:, [2, 1, 0, 3]]
    d, h, w = shape_DHW
    orientation = nib.orientations.io_orientation(affine_ijk)
    return OriginalGrid((w, h, d), affine_ijk, orientation)


def write_nifti(path: Path, array_DHW: np.ndarray, original: OriginalGrid, dtype: Any = None) -> Path:
    """Write a (D, H, W) array in the geometry of ``original``, whole or not at all.

    Args:
        path: ``.nii`` or ``.nii.gz``; its folder is made where it is missing.
        array_DHW: voxels on the canonical form of ``original``.
        original: the grid to write on.
        dtype: voxel type on disk; None keeps the array's (bool becomes uint8).

    Raises:
        UserError: another file ending, or the file cannot be written.
        ValueError: the array is not of the original's shape.
    """
    import nibabel as nib

    path = Path(path)
    if not is_nifti_name(path):
        raise UserError(f"{path}: a NIfTI file name ends in .nii or .nii.gz")
    kind = np.dtype(dtype or (np.uint8 if array_DHW.dtype == bool else array_DHW.dtype))
    affine = original.affine_ijk_44.copy()
    affine[:3] /= original.mm_per_unit
    image = nib.Nifti1Image(np.asarray(original.to_file(array_DHW), dtype=kind), affine, dtype=kind)
    header: Any = image.header
    header["xyzt_units"] = original.xyzt_units
    # the sform holds any affine exactly; the qform only those without shear
    image.set_sform(affine, code=original.sform_code or 2)
    image.set_qform(affine, code=original.qform_code, strip_shears=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    ending = path.name[len(nifti_stem(path)) :].lower()
    temporary = path.with_name(f".{nifti_stem(path)}.{os.getpid()}.part{ending}")
    try:
        nib.save(image, temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


# -- reading -------------------------------------------------------------------------------------------------


def _open(path: Path, *, voxels: bool) -> Any:
    """An image object of nibabel; with ``voxels`` a gzipped file is decompressed at once by igzip."""
    import nibabel as nib

    try:
        with path.open("rb") as file:
            start = file.read(_HEADER_BYTES)
            if not start:
                raise BadScan("the file is empty (0 bytes)", path)
            compressed = start.startswith(_GZIP_MAGIC)
            in_memory = is_nifti_name(path) and (voxels if compressed else path.suffix.lower() == ".gz")
            raw = start + file.read() if in_memory else b""
    except OSError as error:
        raise BadScan(f"cannot read the file: {error.strerror or error}", path) from error
    if not compressed and start.lstrip()[:1] in (b"<", b"{") and is_nifti_name(path):
        raise BadScan(
            "not a NIfTI file but text (a web page or an error message saved under this name)", path
        )
    if in_memory and compressed:
        raw = _decompress(raw, path)
    try:
        image = _from_bytes(raw) if in_memory else nib.load(path)
    except Exception as error:  # nibabel raises whatever its parsers meet in a broken header
        raise BadScan(f"not a readable NIfTI file ({_first_line(error, path)})", path) from error
    if not isinstance(image, (nib.Nifti1Pair, nib.MGHImage)):
        raise BadScan(f"{type(image).__name__} does not state an orientation; convert it to NIfTI", path)
    return image


def _decompress(raw: bytes, path: Path) -> bytes:
    import zlib
    from gzip import decompress

    from isal import igzip, isal_zlib

    damaged: tuple[type[Exception], ...] = (EOFError, OSError, zlib.error, isal_zlib.error)  # pyright: ignore[reportAssignmentType]
    try:
        _check_inflated(raw, path)
        return igzip.decompress(raw)
    except damaged:
        # igzip refuses a few streams that gzip accepts, such as one with zeros behind it
        try:
            return decompress(raw)
        except damaged as error:
            raise BadScan(f"truncated or damaged gzip file ({_first_line(error, path)})", path) from error


def _check_inflated(raw: bytes, path: Path) -> None:
    """Refuse a gzip file that would inflate beyond memory: a few megabytes of zeros may be many gigabytes.

    Raises:
        BadScan: it inflates to more than ``_MOST_INFLATED`` bytes, or states more voxels than that.
    """
    import zlib

    if len(raw) * _GZIP_RATIO <= _MOST_INFLATED:
        return
    header = zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(raw, _HEADER_BYTES)
    little = header[:2] == b"\x5c\x01"
    order = "<" if little else ">"
    shape = np.frombuffer(header[42:56], dtype=f"{order}i2").astype(np.int64).clip(1)
    bits = max(int(np.frombuffer(header[72:74], dtype=f"{order}i2")[0]), 8)
    stated = float(np.prod(shape.astype(float))) * bits / 8
    if stated > _MOST_INFLATED:
        raise BadScan(f"it states {stated / 2**30:.0f} GiB of voxels, more than fit into memory", path)
    # the trailer holds the size modulo 4 GiB: where it does not fit the header, the size is found by inflating in parts
    if int.from_bytes(raw[-4:], "little") > stated + 2**24 or len(raw) > stated + 2**24:
        inflater, total, block = zlib.decompressobj(zlib.MAX_WBITS | 16), 0, raw
        while block and total <= _MOST_INFLATED:
            total += len(inflater.decompress(block, 2**24))
            block = inflater.unconsumed_tail
        if total > _MOST_INFLATED:
            raise BadScan(f"it inflates to more than {_MOST_INFLATED / 2**30:.0f} GiB", path)


def _from_bytes(raw: bytes) -> Any:
    import nibabel as nib

    sizes = {int.from_bytes(raw[:4], "little"), int.from_bytes(raw[:4], "big")}
    kind = nib.Nifti2Image if 540 in sizes else nib.Nifti1Image
    return kind.from_bytes(raw)


def _original_grid(image: Any, path: Path, *, volume: int | None) -> OriginalGrid:
    """Check what the header states and describe the file's grid."""
    import nibabel as nib

    dtype = image.get_data_dtype()
    if dtype.fields is not None or dtype.kind == "V":
        raise BadScan("colour or structured voxels (RGB); a scan has one number per voxel", path)
    if dtype.kind == "c":
        raise BadScan("complex voxels; give the magnitude image", path)
    shape = tuple(int(n) for n in image.shape)
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    volumes = int(np.prod(shape[3:]))
    if volume is None and len(shape) > 3:
        raise BadScan(f"{len(shape)}D with {volumes} volumes; a scan is one 3D volume", path)
    if volume is not None and not (0 <= volume < volumes and len(shape) <= 4):
        raise BadScan(f"{len(shape)}D with {volumes} volumes has no volume {volume}", path)
    if len(shape) < 3:
        raise BadScan(f"{len(shape)} axes; a scan has three", path)
    if min(shape) < 1:
        raise BadScan(f"no voxels (shape {shape})", path)
    header = image.header
    codes = {name: int(header[name]) if name in header else 1 for name in ("sform_code", "qform_code")}
    units = int(header["xyzt_units"]) if "xyzt_units" in header else 2
    affine = np.array(image.affine, dtype=np.float64)
    if not any(codes.values()):
        affine[0] *= -1  # nibabel guesses that the first axis runs to the left; the format says to the right
    if not np.isfinite(affine).all():
        raise BadScan("the affine holds NaN or infinite numbers", path)
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    if (sizes <= 0).any() or abs(np.linalg.det(affine[:3, :3] / np.where(sizes > 0, sizes, 1.0))) < 1e-4:
        raise BadScan("the affine is singular (a voxel size of zero or parallel axes)", path)
    orientation = nib.orientations.io_orientation(affine)
    if not np.isfinite(orientation).all():
        raise BadScan("the affine is singular (an axis without direction)", path)
    mm_per_unit = _mm_per_unit(units, sizes)
    affine[:3] *= mm_per_unit
    return OriginalGrid(
        (shape[0], shape[1], shape[2]),
        affine,
        orientation,
        xyzt_units=units,
        mm_per_unit=mm_per_unit,
        **codes,
    )


def _mm_per_unit(xyzt_units: int, sizes: np.ndarray) -> float:
    """Millimetres of the unit that a header states: 1 where its numbers are millimetres of a scan, or no scan's at all.

    Files that state a unit and mean millimetres all the same are as common as those that mean it.
    """
    stated = {1: 1000.0, 3: 0.001}.get(xyzt_units & 7, 1.0)
    low, high = _PLAUSIBLE_MM
    meant = (sizes >= _CERTAIN_MM[0]).all() and (sizes <= _CERTAIN_MM[1]).all()
    fits = (sizes * stated >= low).all() and (sizes * stated <= high).all()
    return stated if fits and not meant else 1.0


def _voxels(image: Any, original: OriginalGrid, path: Path, *, volume: int | None) -> np.ndarray:
    """Voxels in file axes; integers stay integers unless the header scales them."""
    try:
        stored = np.asanyarray(image.dataobj.get_unscaled())
    except Exception as error:  # truncated data, a missing .img, a lying header: one reason each
        raise BadScan(f"truncated or unreadable voxels ({_first_line(error, path)})", path) from error
    # trailing axes of length 1, or the one volume asked for
    stored = stored[(..., *(volume or 0 for _ in stored.shape[3:4]), *(0 for _ in stored.shape[4:]))]
    slope, inter = getattr(image.dataobj, "slope", 1.0), getattr(image.dataobj, "inter", 0.0)
    if (slope, inter) == (1.0, 0.0):
        return stored
    with np.errstate(over="ignore", invalid="ignore"):
        # double precision as nibabel does, so that content hashes agree with a plain get_fdata()
        return (stored.astype(np.float64) * slope + inter).astype(np.float32)


def _header_flags(image: Any, original: OriginalGrid) -> tuple[str, ...]:
    import nibabel as nib

    flags = []
    if isinstance(image, nib.Nifti1Pair) and original.sform_code == 0 and original.qform_code == 0:
        flags.append("no_orientation")
    if min(original.shape) == 1:
        flags.append("single_slice")
    return tuple(flags)


def _is_integral(array: np.ndarray) -> bool:
    # most fractional volumes show it in the first slices
    with np.errstate(invalid="ignore"):
        middle = array[array.shape[0] // 2]
        return bool(np.array_equal(np.rint(middle), middle) and np.array_equal(np.rint(array), array))


def _spacing(affine_44: np.ndarray) -> TripleMm:
    d, h, w = np.linalg.norm(affine_44[:3, :3], axis=0)
    return float(d), float(h), float(w)


def _first_line(error: BaseException, path: Path) -> str:
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    # reasons go into dropped.csv, which must not hold names of files or subjects
    for name in (str(path), str(path.parent), path.name, nifti_stem(path)):
        text = text.replace(name, "the file") if len(name) > 2 else text
    return text[:160]
