"""Everything thrown together: DICOM, BIDS, Decathlon, nnU-Net and OpenMind sets and loose NIfTI files below one root.

Each data set is found by the file that marks it and read by its own source; DICOM files are found by content, wherever
they lie; of loose NIfTI files the name must tell the modality. Labels are left out: their classes differ from set to
set. An archive with labels is prepared from one set by its own source.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

from pydantic import Field, field_validator

from medseg_ssl.config import Block, UserError
from medseg_ssl.data.nifti import is_nifti_name, nifti_stem
from medseg_ssl.data.sources._json import read_mapping
from medseg_ssl.data.sources._kinds import KNOWN_NAMES, kind_of
from medseg_ssl.data.sources.base import Listing, RawCase, RawRelation, RawScan, Source, SourceConfig
from medseg_ssl.data.sources.dicom import Dicom, DicomConfig
from medseg_ssl.data.sources.folder import VOLUME_ENDINGS, other_format

logger = logging.getLogger(__name__)

_MARK_BYTES = 64 * 2**20
_TASK_FOLDERS = ("imagesTr", "imagesTs", "labelsTr", "labelsTs")
_TOKEN = re.compile(
    rf"(?i)(?:(?P<subject>.+?)[_\-. ])?(?P<token>{KNOWN_NAMES})(?:[_\-. ](?:image|img|brain|n4|norm))?"
)
_LABEL = re.compile(
    r"(?i)(?:.+[_\-. ])?(?:auto|manual)?(?:masks?|seg|segmentation|labels?|lesions?|roi|gt|gtv)"
)
_NO_SUBJECT = re.compile(
    rf"(?i)(?:ses(?:sion)?|visit|day|week|month|year|tp|time[-_ ]?point|baseline|follow[-_ ]?up"
    rf"|pre[-_ ]?op|post[-_ ]?op)[-_ ]?[a-z]?\d*"
    rf"|(?:19|20)\d{{2}}(?P<dash>-?)(?:0[1-9]|1[0-2])(?P=dash)(?:0[1-9]|[12]\d|3[01])"
    rf"|mri?|anat|nii|nifti|niftis|raw|orig|images?|volumes?|{KNOWN_NAMES}"
)
"""Folders between a subject's and its files: sessions, days, kinds of data."""
_NEVER_DICOM = (
    ".json",
    ".csv",
    ".tsv",
    ".txt",
    ".md",
    ".html",
    ".yaml",
    ".yml",
    ".png",
    ".jpg",
    ".pdf",
    ".py",
    ".zip",
)


def _why_not(path: Path) -> str:
    """Why a loose volume is no scan."""
    if not is_nifti_name(path) and other_format(path):
        return other_format(path)
    what = (
        "a label or mask by its name"
        if _LABEL.fullmatch(nifti_stem(path))
        else "its name does not tell its modality"
    )
    return f"{what}; source.folders can explain its folder"


class MixedConfig(SourceConfig):
    """How a heap is read.

    Attributes:
        folders: folder below the root to the block of the source that reads it, where its layout does not show by
            itself (``{name: folder, pattern: …}``); it goes before anything that is found.
        dicom: options of the source ``dicom`` for the DICOM files (no ``regions``: labels are left out; no
            ``test_subjects``: the list below is for them too).
        shared_subjects: one subject name means one person in every data set below the root; without it a name
            counts within its data set (DICOM's PatientID counts everywhere).
        test_subjects: subjects reserved for test, beside those that a set reserves, as ``SET/SUBJECT``: the data set's
            folder, or the first folder of a loose file, and the name.
    """

    folders: dict[str, Block] = Field(default_factory=dict)
    dicom: DicomConfig = DicomConfig()
    shared_subjects: bool = False
    test_subjects: tuple[str, ...] = ()

    @field_validator("dicom")
    @classmethod
    def _names_in_one_place(cls, value: DicomConfig) -> DicomConfig:
        if value.test_subjects:
            raise ValueError("give the patients reserved for test in source.test_subjects")
        return value


@dataclass(frozen=True)
class _Part:
    """A data set below the root: its folder, its source, and the files that are its own."""

    folder: Path
    block: Block
    owns: tuple[Path, ...]


class Mixed(Source):
    """Data sets of any layout below a root."""

    Config = MixedConfig
    config: MixedConfig

    def list(self, root: Path) -> Listing:
        """List all that is found below ``root``.

        Raises:
            UserError: the root is missing, a folder of the config is not there, or nothing is a scan.
            ConfigError: wrong keys in a folder's block.
        """
        root = Path(root)
        files = [path for path in self.files(root) if not path.name.startswith(".")]
        parts = self._parts(root, files)
        owned = {path for part in parts for path in _below(files, part.owns)}
        listings = [found for part in parts for found in self._read(part, root)]
        loose = [path for path in files if path not in owned]
        volumes = [
            path for path in loose if path.name.lower().endswith(VOLUME_ENDINGS) and _is_no_dicom(path)
        ]
        named = set(volumes)
        others = [path for path in loose if path not in named and path.suffix.lower() not in _NEVER_DICOM]
        listings += [self._loose(volumes, root), self._dicom(others)]
        whole = _joined(listings)
        if not whole.cases:
            shown = f"; {whole.rejected[0][0].name}: {whole.rejected[0][1]}" if whole.rejected else ""
            raise UserError(f"no scan below {root}: of {len(files)} files none is one{shown}")
        wanted = frozenset(self.config.test_subjects)
        unknown = sorted(wanted - {scan.subject for case in whole.cases for scan in case.scans})
        if unknown:
            raise UserError(f"source.test_subjects names {unknown[0]!r}, which is not below {root}")
        return replace(whole, test_subjects=whole.test_subjects | wanted)

    def _parts(self, root: Path, files: Iterable[Path]) -> list[_Part]:
        """Data sets, those of the config first; a set within another belongs to the outer one."""
        parts = []
        for name, block in self.config.folders.items():
            folder = root / name
            if not folder.is_dir():
                raise UserError(f"source.folders names {name!r}, which is no folder below {root}")
            block.resolve("medseg_ssl.data.sources", Source, prefix=f"source.folders.{name}")
            parts.append(_Part(folder, block, (folder,)))
        for path in files:
            found = _marked(path)
            if found is not None and not any(_inside(path, part.owns) for part in parts):
                parts.append(found)
        return parts

    def _read(self, part: _Part, root: Path) -> Iterator[Listing]:
        """What a data set's own source lists, without labels and with subjects named after the set."""
        source, options = part.block.resolve("medseg_ssl.data.sources", Source, prefix="source")
        try:
            found = source(options, self.fan_out).list(part.folder)  # pyright: ignore[reportAbstractUsage]
        except UserError as error:
            # the message names paths, which are not for dropped.csv
            logger.warning("%s is left out: %s", part.folder, error)
            reason = f"its data set looks like {part.block.name} and cannot be read as such"
            yield Listing((), rejected=tuple((p, reason) for p in _below(self.files(part.folder), part.owns)))
            return
        prefix = "" if self.config.shared_subjects else f"{part.folder.relative_to(root).as_posix()}/"
        if found.unknown_test_subjects:
            unknown = sorted(found.unknown_test_subjects)[0]
            raise UserError(
                f"source.folders: test_subjects names {unknown!r}, which is not below {part.folder}"
            )
        yield _without_labels(found, prefix=prefix)

    def _loose(self, volumes: Iterable[Path], root: Path) -> Listing:
        """NIfTI files whose names tell subject and modality: ``SUBJECT_T1.nii.gz`` or ``SUBJECT/T1.nii.gz``.

        Between a subject's folder and its files there may be folders of sessions and of kinds of data.
        """
        cases, rejected = [], []
        for path in volumes:
            found = _TOKEN.fullmatch(nifti_stem(path)) if is_nifti_name(path) else None
            if found is None:
                rejected.append((path, _why_not(path)))
                continue
            relative = path.relative_to(root)
            folders = relative.parts[:-1] or (root.name,)
            top = relative.parts[0] if len(relative.parts) > 1 else ""
            subject = found["subject"] or next(
                (name for name in reversed(folders) if not _NO_SUBJECT.fullmatch(name)), None
            )
            if subject is None:
                reason = (
                    "neither its name nor its folders tell whose scan it is; source.folders can explain them"
                )
                rejected.append((path, reason))
                continue
            kind = kind_of(found["token"], {})
            scan = RawScan(
                path=path,
                subject=subject if self.config.shared_subjects else f"{top}/{subject}",
                study=relative.parent.as_posix(),
                modality=kind.modality,
                contrast=kind.contrast,
                unit=kind.stored_unit,
                token=found["token"],
            )
            cases.append(RawCase(relative.as_posix(), (scan,)))
        return Listing(tuple(cases), rejected=tuple(rejected))

    def _dicom(self, files: Iterable[Path]) -> Listing:
        return Dicom(self.config.dicom, self.fan_out).list_files(files)


def _marked(path: Path) -> _Part | None:
    """The data set that a file marks, by its name and content."""
    folder = path.parent
    if path.name == "dataset_description.json":
        return _Part(folder, Block(name="bids"), (folder,))
    if path.name == "pretrain_data.json":
        return _Part(folder, Block(name="openmind"), (folder,))
    if path.name != "dataset.json":
        return None
    try:
        task = read_mapping(path, most_bytes=_MARK_BYTES)
    except ValueError:
        return None
    owns = (path, *(folder / name for name in _TASK_FOLDERS))
    numbered = any(re.search(r"_\d{4}\.nii(\.gz)?$", p.name) for p in (folder / "imagesTr").glob("*"))
    if "channel_names" in task or numbered:
        return _Part(folder, Block(name="nnunet"), owns)
    return _Part(folder, Block(name="msd"), owns) if "training" in task or "modality" in task else None


def _is_no_dicom(path: Path) -> bool:
    """Whether a file with the name of a volume is one, and not DICOM under such a name (``.img``, ``.dcm``)."""
    if is_nifti_name(path):
        return True
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] != b"DICM" and path.suffix.lower() != ".dcm"
    except OSError:
        return True


def _inside(path: Path, owns: Iterable[Path]) -> bool:
    return any(path == place or place in path.parents for place in owns)


def _below(files: Iterable[Path], owns: Iterable[Path]) -> list[Path]:
    places = tuple(owns)
    return [path for path in files if _inside(path, places)]


def _without_labels(found: Listing, *, prefix: str) -> Listing:
    """The listing with each scan as a case of its own, and its general relation stated pair by pair."""
    named = {
        scan: replace(scan, subject=prefix + scan.subject) for case in found.cases for scan in case.scans
    }
    labels = tuple(
        (case.label, "a label; the source mixed takes none, its set's own source does")
        for case in found.cases
        if case.label is not None
    )
    relations = [RawRelation(named[r.scan_a], named[r.scan_b], r.relation) for r in found.relations]
    if found.relation is not None:
        studies: dict[tuple[str, str], list[RawScan]] = {}
        for scan in named.values():
            studies.setdefault((scan.subject, scan.study), []).append(scan)
        relations += [
            RawRelation(a, b, found.relation) for group in studies.values() for a, b in combinations(group, 2)
        ]
    return Listing(
        tuple(
            RawCase(f"{prefix}{case.name}#{scan.channel}", (named[scan],))
            for case in found.cases
            for scan in case.scans
        ),
        relations=tuple(relations),
        rejected=found.rejected + labels,
        test_subjects=frozenset(prefix + name for name in found.test_subjects),
    )


def _joined(listings: Iterable[Listing]) -> Listing:
    every = list(listings)
    return Listing(
        cases=tuple(case for found in every for case in found.cases),
        relations=tuple(r for found in every for r in found.relations),
        rejected=tuple({p: r for found in every for p, r in found.rejected}.items()),
        test_subjects=frozenset(name for found in every for name in found.test_subjects),
    )
