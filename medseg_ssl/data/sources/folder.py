"""A folder whose file names tell subject, study and modality, by a pattern or a regular expression."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from medseg_ssl.config import UserError
from medseg_ssl.data.scanner import scanner_name
from medseg_ssl.data.sources._kinds import KNOWN_NAMES, Kind, kind_of
from medseg_ssl.data.sources._labels import class_values
from medseg_ssl.data.sources.base import Listing, RawCase, RawRelation, RawScan, Source, SourceConfig
from medseg_ssl.types import RELATIONS

FIELDS = ("subject", "study", "modality", "scanner")
VOLUME_ENDINGS = (".nii", ".nii.gz", ".hdr", ".img", ".mgz", ".mgh", ".mha", ".mhd", ".nrrd", ".mnc", ".dcm")
"""A file that ends so and fits no pattern is reported; anything else (a README) is passed over."""

_OTHER_FORMATS = {
    ".hdr": "half of a .hdr/.img pair",
    ".img": "half of a .hdr/.img pair",
    ".mgz": "a FreeSurfer volume",
    ".mgh": "a FreeSurfer volume",
    ".mha": "a MetaImage volume",
    ".mhd": "a MetaImage volume",
    ".nrrd": "an NRRD volume",
    ".mnc": "a MINC volume",
}


def other_format(path: Path) -> str:
    """What to say of a volume that is no single NIfTI file and that no pattern asks for; ``""`` for any other file."""
    kind = _OTHER_FORMATS.get(path.suffix.lower())
    return f"{kind}; only NIfTI (.nii, .nii.gz) and DICOM are read: convert it" if kind else ""


class FolderConfig(SourceConfig):
    """How file names are read.

    Attributes:
        pattern: path below the root with the fields ``{subject}`` (required), ``{study}``, ``{modality}`` and
            ``{scanner}``; a study or scanner holds no ``_``; for other names write ``regex``. The scanner stands in the
            manifest as it is written (the others are hashed): no hospital's name belongs there.
        regex: in place of ``pattern``, with named groups of the same names, matched against the whole path.
        modalities: modality token in the path to its kind; without ``{modality}`` exactly one. Empty: the
            names that tell it by themselves (``CT``, ``T1``, ``MR_T2``, ``FLAIR``, ``PET``, …).
        label_pattern: path of the label of a scan or study, with the same fields.
        classes: label value to name; background (0) need not be named.
        labeled: tokens of the scans the label belongs to; null: all of the study.
        channels: tokens that make one multi-channel case per study; null: each scan is a case.
        relation: declared relation between the scans of a study; null: derived (same study).
        frame: scans of one ``study`` or one ``subject`` share a frame of reference; null: unknown.
        relations_file: CSV below the root with columns subject, a, b, relation, where a and b are file names,
            or tokens (``CT``), or study and token (``day1_CT``).
        unknown_when_absent: classes (values or names) that are unknown, not absent, in a case without a voxel
            of them.
        test_subjects: subjects reserved for test.
    """

    pattern: str | None = None
    regex: str | None = None
    modalities: dict[str, Kind] = Field(default_factory=dict)
    label_pattern: str | None = None
    classes: dict[int, str] = Field(default_factory=dict)
    labeled: tuple[str, ...] | None = None
    channels: tuple[str, ...] | None = None
    relation: Literal["registered", "same_frame", "same_study", "same_subject"] | None = None
    frame: Literal["study", "subject"] | None = None
    relations_file: str | None = None
    unknown_when_absent: tuple[int | str, ...] = ()
    test_subjects: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> FolderConfig:
        if (self.pattern is None) == (self.regex is None):
            raise ValueError("give exactly one of pattern and regex")
        for name in ("pattern", "label_pattern"):
            text = getattr(self, name)
            unknown = set(re.findall(r"\{(.*?)\}", text or "")) - set(FIELDS)
            if unknown:
                raise ValueError(f"{name} has no field {{{sorted(unknown)[0]}}}; known: {', '.join(FIELDS)}")
        fields = self.fields
        if "subject" not in fields:
            raise ValueError("the pattern must hold {subject} (as a regex: (?P<subject>…))")
        if "modality" not in fields and len(self.modalities) != 1:
            raise ValueError(
                f"without {{modality}} there must be exactly one modality, found {len(self.modalities)}"
            )
        for name in ("labeled", "channels"):
            wrong = sorted(set(getattr(self, name) or ()) - set(self.modalities))
            if wrong and self.modalities:
                raise ValueError(f"{name} names {wrong[0]!r}; known tokens: {', '.join(self.modalities)}")
        if self.label_pattern is not None and not set(self.classes) - {0}:
            raise ValueError("label_pattern needs classes, for example classes: {1: tumour}")
        return self

    @property
    def fields(self) -> frozenset[str]:
        """Fields that stand in the path of a scan."""
        if self.regex is not None:
            try:
                return frozenset(re.compile(self.regex).groupindex)
            except re.error as error:
                raise ValueError(f"regex: {error}") from None
        return frozenset(re.findall(r"\{(.*?)\}", self.pattern or ""))


@dataclass(frozen=True)
class _Named:
    path: Path
    relative: str
    subject: str
    study: str
    token: str
    scanner: str = ""


_Rejected = list[tuple[Path, str]]
_Names = tuple[list[_Named], _Rejected]
_Cases = tuple[list[RawCase], _Rejected]


class Folder(Source):
    """Scans found by their paths below a root."""

    Config = FolderConfig
    config: FolderConfig

    def list(self, root: Path) -> Listing:
        """List the scans below ``root``.

        Raises:
            UserError: the root is missing, or no file in it has a name as the config says.
        """
        config = self.config
        named, rejected = self._read_names(Path(root))
        if not named:
            raise UserError(_nothing_found(Path(root), config, rejected))
        by_study: dict[tuple[str, str], list[_Named]] = {}
        for file in named:
            by_study.setdefault((file.subject, file.study), []).append(file)
        cases: list[RawCase] = []
        for files in by_study.values():
            made, refused = self._cases(files, Path(root))
            cases += made
            rejected += refused
        scans = {scan.path.relative_to(root).as_posix(): scan for case in cases for scan in case.scans}
        unknown = set(config.test_subjects) - {f.subject for f in named}
        if unknown:
            raise UserError(f"source.test_subjects names {sorted(unknown)[0]!r}, which is not below {root}")
        return Listing(
            cases=tuple(cases),
            classes={0: "background", **config.classes} if config.label_pattern else {},
            relation=config.relation,
            relations=tuple(self._relations(Path(root), scans)),
            unknown_when_absent=class_values(config.unknown_when_absent, config.classes),
            rejected=tuple(rejected),
            test_subjects=frozenset(config.test_subjects),
        )

    def _read_names(self, root: Path) -> _Names:
        config = self.config
        strict = re.compile(config.regex or _pattern_regex(config.pattern or "", _tokens(config)))
        loose = re.compile(config.regex or _pattern_regex(config.pattern or "", _ANY))
        label = re.compile(_pattern_regex(config.label_pattern, _ANY)) if config.label_pattern else None
        named, rejected = [], []
        for path in self.files(root):
            relative = path.relative_to(root).as_posix()
            if path.name.startswith(".") or not path.name.lower().endswith(VOLUME_ENDINGS):
                continue
            found = strict.fullmatch(relative)
            groups = found.groupdict() if found else {}
            token = groups.get("modality") or (
                "" if "modality" in config.fields else next(iter(config.modalities))
            )
            if found and re.fullmatch(_tokens(config), token):
                study, scanner = groups.get("study") or "", groups.get("scanner") or ""
                named.append(_Named(path, relative, groups["subject"], study, token, scanner))
            elif label is not None and label.fullmatch(relative):
                continue
            elif found or loose.fullmatch(relative):
                # without the token: of an odd name it may hold a part of the subject's, and reasons are public
                rejected.append((path, f"its modality is none of source.modalities; known: {_known(config)}"))
            else:
                other = other_format(path)
                rejected.append((path, other or "its path does not match the source's pattern"))
        return named, rejected

    def _cases(self, files: Sequence[_Named], root: Path) -> _Cases:
        """Cases of one study, and files that cannot be told apart."""
        config = self.config
        refused: list[tuple[Path, str]] = []
        by_token: dict[str, _Named] = {}
        for file in files:
            if file.token in by_token:
                refused.append(
                    (file.path, f"a second {file.token} in the same study; add {{study}} to the pattern")
                )
            else:
                by_token[file.token] = file
        scans = {token: self._scan(file) for token, file in by_token.items()}
        cases: list[RawCase] = []
        channels = config.channels or ()
        if channels and all(token in scans for token in channels):
            first = by_token[channels[0]]
            members = tuple(replace(scans[token], channel=i) for i, token in enumerate(channels))
            cases.append(RawCase(_name(first, "+".join(channels)), members, self._label(first, root)))
        elif channels and (lost := self._label(files[0], root)) is not None:
            missing = ", ".join(token for token in channels if token not in scans)
            refused.append((lost, f"its study lacks channels of the case: {missing}"))
        taken = {scan.token for case in cases for scan in case.scans}
        for token, scan in scans.items():
            if token in taken:
                continue
            carries = not channels and (config.labeled is None or token in config.labeled)
            label = self._label(by_token[token], root) if carries else None
            cases.append(RawCase(_name(by_token[token], token), (scan,), label))
        return cases, refused

    def _scan(self, file: _Named) -> RawScan:
        kind = kind_of(file.token, self.config.modalities)
        shared = self.config.relation in ("registered", "same_frame")
        frame = {"study": f"study {file.study}", "subject": "subject"}.get(
            self.config.frame or ("study" if shared else ""), ""
        )
        return RawScan(
            path=file.path,
            subject=file.subject,
            study=file.study,
            modality=kind.modality,
            contrast=kind.contrast,
            unit=kind.stored_unit,
            frame=frame,
            token=file.token,
            scanner=scanner_name("", file.scanner),
        )

    def _label(self, file: _Named, root: Path) -> Path | None:
        if self.config.label_pattern is None:
            return None
        values = {
            "subject": file.subject,
            "study": file.study,
            "modality": file.token,
            "scanner": file.scanner,
        }
        path = root / self.config.label_pattern.format(**values)
        return path if path.is_file() else None

    def _relations(self, root: Path, scans: dict[str, RawScan]) -> Iterator[RawRelation]:
        if self.config.relations_file is None:
            return
        path = root / self.config.relations_file
        if not path.is_file():
            raise UserError(f"no file {path}, which source.relations_file names")
        with path.open(newline="", encoding="utf-8") as stream:
            reader = csv.DictReader(stream)
            columns = ("subject", "a", "b", "relation")
            if reader.fieldnames is None or not set(columns) <= set(reader.fieldnames):
                raise UserError(f"{path} must have the columns {', '.join(columns)}")
            named = _names_by_subject(scans.items())
            for number, row in enumerate(reader, start=2):
                yield _relation(row, named, where=f"{path}, line {number}")


def _relation(row: dict[str, str], named: dict[str, dict[str, list[RawScan]]], *, where: str) -> RawRelation:
    if row["relation"] not in RELATIONS:
        raise UserError(f"{where}: no relation {row['relation']!r}; known: {', '.join(RELATIONS)}")
    ends = []
    for column in ("a", "b"):
        found = named.get(row["subject"], {}).get(row[column], [])
        if len(found) != 1:
            what = "names no scan" if not found else f"names {len(found)} scans"
            raise UserError(f"{where}: {column} = {row[column]!r} {what} of subject {row['subject']!r}")
        ends.append(found[0])
    return RawRelation(ends[0], ends[1], row["relation"])


def _names_by_subject(scans: Iterable[tuple[str, RawScan]]) -> dict[str, dict[str, list[RawScan]]]:
    """Every name by which a relations file may call a scan, per subject."""
    named: dict[str, dict[str, list[RawScan]]] = {}
    for relative, scan in scans:
        stem = re.sub(r"\.nii(\.gz)?$", "", scan.path.name)
        names = {
            relative,
            scan.path.name,
            stem,
            scan.token,
            f"{scan.study}_{scan.token}",
            f"{scan.study}/{scan.token}",
        }
        for name in names:
            named.setdefault(scan.subject, {}).setdefault(name, []).append(scan)
    return named


_ANY = "[^/]+?"


def _tokens(config: FolderConfig) -> str:
    """Regular expression of the modality tokens the config knows; of T1 and T1w the longer comes first."""
    if not config.modalities:
        return f"(?i:{KNOWN_NAMES})"
    return "|".join(sorted(map(re.escape, config.modalities), key=len, reverse=True))


def _pattern_regex(pattern: str, tokens: str) -> str:
    """The pattern as a regular expression; a field met again must repeat its text."""
    # the subject is as short as it can be, so that of the tokens T1 and MR_T1 the longer one is found
    field = {"subject": _ANY, "study": "[^/_]+?", "modality": tokens, "scanner": "[^/_]+?"}
    seen: set[str] = set()
    out = []
    for part in re.split(r"(\{.*?\})", pattern):
        name = part[1:-1]
        if part.startswith("{") and name in field:
            out.append(f"(?P={name})" if name in seen else f"(?P<{name}>{field[name]})")
            seen.add(name)
        else:
            out.append(re.escape(part))
    return "".join(out)


def _name(file: _Named, token: str) -> str:
    return "/".join(part for part in (file.subject, file.study, token) if part)


def _known(config: FolderConfig) -> str:
    return ", ".join(config.modalities) or "names such as CT, T1, MR_T2, FLAIR, PET"


def _nothing_found(root: Path, config: FolderConfig, rejected: list[tuple[Path, str]]) -> str:
    if not rejected:
        return f"no scan below {root}: it holds no file that could be a volume (.nii, .nii.gz, …)"
    path, reason = rejected[0]
    layout = config.pattern or config.regex
    return f"no scan below {root}: of {len(rejected)} volumes none matches {layout!r}; {path.name}: {reason}"
