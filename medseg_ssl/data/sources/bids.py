"""BIDS, the Brain Imaging Data Structure (https://bids-specification.readthedocs.io, doi 10.1038/sdata.2016.44).

Scans are ``sub-<label>[/ses-<label>]/<datatype>/sub-<label>[_ses-<label>][_<entity>-<value> …]_<suffix>.nii[.gz]``
below a folder with a ``dataset_description.json``. A root may hold several data sets, one within another too;
a data set below ``derivatives`` is none of them.

- The suffix tells modality and contrast (``T1w``, ``T2w``, ``T2starw``, ``FLAIR``, ``PDw``, ``angio``, ``ct``,
  ``pet``, …). One that nobody explained is rejected, never guessed; ``source.modalities`` explains it.
- Series (``bold``, ``dwi``, ``asl``), field maps, projections, masks, quantitative maps (``T1map``, ``MTRmap``)
  and the images such maps are computed from (``MEGRE``, ``MTR``) are rejected with the reason. Maps and their
  sources are taken where ``source.modalities`` names them.
- ``part-phase``, ``part-real`` and ``part-imag`` are rejected: the magnitude is the scan.
- ``ce-<agent>``, or ``ContrastBolusIngredient`` in the sidecar, adds ``+C`` to the contrast.
- A PET's contrast is its tracer (``trc-``, else ``TracerName``). It is in SUV where the sidecar's ``Units`` say
  so (``SUV`` or ``SUVbw``), else raw: ``Bq/mL``, ``g/mL`` and SUVs by other norms are no SUV. One with several
  time frames is rejected.
- A session is a study. The frame of reference is unknown, unless the scan's own sidecar names its
  ``FrameOfReferenceUID``.
- Sidecars are inherited as BIDS has it: one further up applies where its suffix is the same and its entities are
  among the scan's. Nothing else is taken from them. A sidecar that cannot be read is listed as rejected, and its
  scan goes on as one without it. ``participants.tsv`` and other tables are never opened.
- What lies below ``derivatives`` is a label that ``labels`` names, a scan where ``derivatives`` names the
  derivative, or rejected.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from medseg_ssl.config import UserError
from medseg_ssl.data.nifti import is_nifti_name, nifti_stem
from medseg_ssl.data.sources._json import read_mapping
from medseg_ssl.data.sources._kinds import Kind
from medseg_ssl.data.sources._labels import class_values
from medseg_ssl.data.sources._suffixes import SCANS, why_no_scan
from medseg_ssl.data.sources.base import Listing, RawCase, RawScan, Source, SourceConfig

SIDECAR_BYTES = 16 * 2**20
"""A sidecar holds parameters, at most the frame times of a long PET; one that is larger is not read."""

DESCRIPTION = "dataset_description.json"
_DERIVED = ("space", "res", "den", "label", "desc", "hemi", "seg", "atlas", "scale")
"""Entities that only derivatives have; a label may add them to the entities of its scan."""

_LABEL = r"[A-Za-z0-9+]+"
_PLACE = re.compile(rf"(?P<subject>sub-{_LABEL})(?:/(?P<session>ses-{_LABEL}))?/(?P<datatype>[A-Za-z0-9]+)")
_NAME = re.compile(rf"(?P<entities>[a-z]+-{_LABEL}(?:_[a-z]+-{_LABEL})*)_(?P<suffix>[A-Za-z0-9]+)")
_WITHOUT_AGENT = ("no", "none", "pre", "native", "without")
_SUV = re.compile(r"suv(?:[ _-]?bw)?(?:\s*[(\[]?\s*g\s*/\s*ml\s*[)\]]?)?", re.IGNORECASE)


class BIDSConfig(SourceConfig):
    """How a BIDS tree is read.

    Attributes:
        suffixes: suffixes to take (``[T1w, T2w]``); null: every one that is known to be a scan's.
        modalities: suffix to its kind, for suffixes that do not tell it; they go before the known ones.
        labels: what follows the scan's name in the name of its label below ``derivatives``, in order of
            preference: ``seg-manual`` for ``sub-1_T1w_seg-manual``; ``dseg`` or ``desc-manual_dseg`` or
            ``label-lesion_mask`` for a label with the scan's entities and without its suffix. ``*`` stands for
            any text; ``NAME/`` in front names the derivative. The first that is there is the label.
        labeled: suffixes of the scans the labels belong to; null: all.
        classes: label value to name; background (0) need not be named.
        derivatives: derivatives whose volumes are scans too, for example preprocessed ones: the name of their
            folder.
        shared_subjects: one subject label means one person in every data set below the root; without it a
            label counts within its data set. Two roots always share their labels.
        unknown_when_absent: classes (values or names) that are unknown, not absent, in a case without a voxel
            of them.
        test_subjects: subjects reserved for test, as ``sub-01``, behind the folder of their data set below the
            root (``study2/sub-01``).
    """

    suffixes: tuple[str, ...] | None = None
    modalities: dict[str, Kind] = Field(default_factory=dict)
    labels: tuple[str, ...] = ()
    labeled: tuple[str, ...] | None = None
    classes: dict[int, str] = Field(default_factory=dict)
    derivatives: tuple[str, ...] = ()
    shared_subjects: bool = False
    unknown_when_absent: tuple[int | str, ...] = ()
    test_subjects: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> BIDSConfig:
        known = {**SCANS, **self.modalities}
        for name in ("suffixes", "labeled"):
            wrong = sorted(set(getattr(self, name) or ()) - set(known))
            if wrong:
                raise ValueError(f"{name} names {wrong[0]!r}; known suffixes: {', '.join(known)}")
        if self.labels and not set(self.classes) - {0}:
            raise ValueError("labels needs classes, for example classes: {1: tumour}")
        for label in self.labels:
            if not re.fullmatch(r"(?:[^/]+/)?[^/]+", label) or is_nifti_name(Path(label)):
                raise ValueError(
                    f"labels holds {label!r}; write what follows the scan's name, without .nii.gz, "
                    "for example seg-manual or NAME/desc-manual_dseg"
                )
        return self


@dataclass(frozen=True)
class _Volume:
    """A NIfTI file in its place.

    Attributes:
        path: the file.
        relative: its path below the root.
        stem: file name without ending.
        top: the data set's folder, or the derivative's.
        dataset: the data set's path below the root, ``""`` for the root itself.
        derivative: name of the derivative it lies in, ``""`` for raw data.
        subject: ``sub-…`` as its folder says; ``""`` where it lies in no subject's folder.
        session: ``ses-…`` or ``""``.
        datatype: ``anat``, ``pet``, …
        entities: of its name, in order; empty where it is no BIDS name.
        suffix: likewise.
    """

    path: Path
    relative: str
    stem: str
    top: Path
    dataset: str
    derivative: str
    subject: str = ""
    session: str = ""
    datatype: str = ""
    entities: tuple[tuple[str, str], ...] = ()
    suffix: str = ""

    @property
    def group(self) -> tuple[str, str, str, str]:
        """What a scan and its label share."""
        return self.dataset, self.subject, self.session, self.datatype

    def entity(self, key: str) -> str | None:
        """Value of an entity of its name."""
        return dict(self.entities).get(key)


@dataclass
class _Tree:
    """What lies below a root.

    Attributes:
        volumes: every NIfTI file.
        sidecars: folder to the names of the JSON files in it.
        rejected: files that could not be looked into, with the reason.
        datasets: whether there is a data set.
    """

    volumes: list[_Volume] = field(default_factory=list)
    sidecars: dict[Path, list[str]] = field(default_factory=dict)
    rejected: list[tuple[Path, str]] = field(default_factory=list)
    datasets: bool = False


class BIDS(Source):
    """Scans of the BIDS data sets below a root."""

    Config = BIDSConfig
    config: BIDSConfig

    def list(self, root: Path) -> Listing:
        """List the data sets below ``root``.

        Raises:
            UserError: the root is missing or cannot be read, or holds no scan in BIDS layout.
        """
        root, config = Path(root), self.config
        if not root.is_dir():
            raise UserError(f"no folder {root}")
        tree = _read_tree(root)
        sidecars = _Sidecars(tree.sidecars)
        rejected = list(tree.rejected)
        readable = []
        for volume in tree.volumes:
            if os.path.isfile(volume.path):
                readable.append(volume)
            else:
                rejected.append(
                    (volume.path, "its content is not here: a broken link (`datalad get` fetches such files)")
                )
        scans: dict[_Volume, RawScan] = {}
        for volume in readable:
            scan = self._scan(volume, sidecars)
            if isinstance(scan, RawScan):
                scans[volume] = scan
            else:
                rejected.append((volume.path, scan))
        labels, refused = self._labels(scans, readable)
        used = set(labels.values())
        rejected = [(path, refused.get(path, why)) for path, why in rejected if path not in used]
        cases = [RawCase(v.relative, (scan,), labels.get(v)) for v, scan in scans.items()]
        rejected += sidecars.unreadable
        if not cases:
            raise UserError(_nothing_found(root, tree, rejected))
        unknown = set(config.test_subjects) - {case.scans[0].subject for case in cases}
        if unknown:
            raise UserError(f"source.test_subjects names {sorted(unknown)[0]!r}, which is not below {root}")
        return Listing(
            cases=tuple(cases),
            classes={0: "background", **config.classes} if config.labels else {},
            unknown_when_absent=class_values(config.unknown_when_absent, config.classes),
            rejected=tuple(rejected),
            test_subjects=frozenset(config.test_subjects),
        )

    def _scan(self, volume: _Volume, sidecars: _Sidecars) -> RawScan | str:
        """The scan a file holds, or the reason why it is none."""
        config = self.config
        if volume.derivative and volume.derivative not in config.derivatives:
            return (
                "it lies in a derivative and is neither the label of a listed scan (source.labels) "
                "nor to be taken as a scan (source.derivatives)"
            )
        if not volume.subject:
            return "it does not lie in sub-<label>[/ses-<label>]/<datatype>/ of a BIDS data set"
        if not volume.suffix or not volume.entities:
            return "its name is none of BIDS: sub-<label>[_ses-<label>][_<entity>-<value> …]_<suffix>.nii.gz"
        named = (volume.entity("sub"), volume.entity("ses") or "")
        if named != (volume.subject[4:], volume.session[4:]):
            return "its name and its folders tell different subjects or sessions"
        known = {**SCANS, **config.modalities}
        if volume.suffix not in known:
            # without the suffix: of an odd name it may hold a part of the subject's, and reasons are public
            return why_no_scan(volume.suffix) or (
                f"its suffix is none of the known ones: {', '.join(known)}; source.modalities can explain it"
            )
        if config.suffixes is not None and volume.suffix not in config.suffixes:
            return f"its suffix is none of source.suffixes: {', '.join(config.suffixes)}"
        if volume.entity("part") in ("phase", "real", "imag"):
            return "the phase, real or imaginary part of a complex image; its magnitude is the scan"
        metadata = sidecars.of(volume)
        times = metadata.get("FrameTimesStart")
        if isinstance(times, list) and len(times) > 1:
            return f"a dynamic series of {len(times)} time frames (4D); a scan is one static or summed volume"
        kind = known[volume.suffix]
        return RawScan(
            path=volume.path,
            subject=volume.subject if self.config.shared_subjects else _below(volume.dataset, volume.subject),
            study=_below(volume.dataset, volume.session),
            modality=kind.modality,
            contrast=_contrast(kind, volume, metadata),
            unit="SUV" if kind.unit is None and _is_suv(kind, metadata) else kind.stored_unit,
            frame=sidecars.frame(volume),
            token="_".join(
                (*(f"{k}-{v}" for k, v in volume.entities if k not in ("sub", "ses")), volume.suffix)
            ),
        )

    # -- labels ----------------------------------------------------------------------------------------------

    def _labels(
        self, scans: Iterable[_Volume], volumes: Iterable[_Volume]
    ) -> tuple[dict[_Volume, Path], dict[Path, str]]:
        """The label of each scan that has one, and label files that cannot be used, with the reason."""
        config = self.config
        if not config.labels:
            return {}, {}
        candidates: dict[tuple[str, str, str, str], list[_Volume]] = {}
        known = {**SCANS, **config.modalities}
        for volume in volumes:
            # a preprocessed scan is no label, whatever the pattern
            if volume.derivative and volume.subject and volume.suffix not in known:
                candidates.setdefault(volume.group, []).append(volume)
        claims: dict[_Volume, list[_Volume]] = {}
        refused: dict[Path, str] = {}
        for scan in scans:
            if config.labeled is not None and scan.suffix not in config.labeled:
                continue
            found = next(filter(None, self._found(scan, candidates.get(scan.group, []))), [])
            if len(found) == 1:
                claims.setdefault(found[0], []).append(scan)
                continue
            refused |= dict.fromkeys(
                (volume.path for volume in found),
                f"one of {len(found)} labels of the same scan; "
                "write source.labels as NAME/… to choose the derivative",
            )
        labels = {}
        for label, claimants in claims.items():
            # what a derivative made of a scan comes before the scan itself
            own = [scan for scan in claimants if scan.derivative == label.derivative] or claimants
            if len(own) == 1:
                labels[own[0]] = label.path
            else:
                refused[label.path] = (
                    f"it could be the label of {len(own)} scans; source.labeled chooses by their suffix"
                )
        return labels, refused

    def _found(self, scan: _Volume, candidates: Sequence[_Volume]) -> Iterator[list[_Volume]]:
        """For each entry of ``labels`` in turn, the files that could be meant."""
        for pattern in self.config.labels:
            derivative, _, ending = pattern.rpartition("/")
            yield [
                volume
                for volume in candidates
                if derivative in ("", volume.derivative)
                and any(fnmatchcase(rest, ending) for rest in _rests(volume, scan))
            ]


def _rests(volume: _Volume, scan: _Volume) -> Iterator[str]:
    """What the name of a derivative adds to the name of a scan, read in either way BIDS trees have it."""
    if volume.stem.startswith(f"{scan.stem}_"):
        yield volume.stem[len(scan.stem) + 1 :]
    shared = tuple((key, value) for key, value in scan.entities if key != "desc" or not scan.derivative)
    own, added = volume.entities[: len(shared)], volume.entities[len(shared) :]
    if volume.suffix and own == shared and all(key in _DERIVED for key, _ in added):
        yield "_".join((*(f"{key}-{value}" for key, value in added), volume.suffix))


# -- what a scan shows ---------------------------------------------------------------------------------------


def _contrast(kind: Kind, volume: _Volume, metadata: Mapping[str, Any]) -> str:
    contrast = kind.contrast
    if kind.modality == "PT":
        return contrast or _tracer(volume.entity("trc") or metadata.get("TracerName"))
    agent = volume.entity("ce") or metadata.get("ContrastBolusIngredient")
    given = isinstance(agent, str) and agent.strip().lower() not in ("", *_WITHOUT_AGENT)
    return f"{contrast}+C" if given and not contrast.endswith("+C") else contrast


def _tracer(name: object) -> str:
    """A tracer's name as it may stand in a manifest; every way to write fluorodeoxyglucose is ``FDG``."""
    plain = re.sub(r"[^A-Za-z0-9]", "", name) if isinstance(name, str) else ""
    return "FDG" if re.search("fdg|deoxyglucose", plain, re.IGNORECASE) else plain[:24]


def _is_suv(kind: Kind, metadata: Mapping[str, Any]) -> bool:
    units = metadata.get("Units")
    return kind.modality == "PT" and isinstance(units, str) and _SUV.fullmatch(units.strip()) is not None


class _Sidecars:
    """Metadata of scans, from JSON files by BIDS' rule of inheritance.

    Attributes:
        unreadable: files that say nothing, with the reason.
    """

    def __init__(self, names: Mapping[Path, Sequence[str]]) -> None:
        self.unreadable: list[tuple[Path, str]] = []
        self._read: dict[Path, dict[str, Any]] = {}
        self._parsed = {
            folder: [(folder / name, *_parse_name(name.removesuffix(".json"))) for name in inside]
            for folder, inside in names.items()
        }

    def of(self, volume: _Volume) -> dict[str, Any]:
        """What applies to a scan; the nearer file goes before the farther."""
        metadata: dict[str, Any] = {}
        folders = [f for f in (volume.path.parent, *volume.path.parents) if f.is_relative_to(volume.top)]
        for folder in reversed(dict.fromkeys(folders)):
            applying = [
                (len(entities), path)
                for path, entities, suffix in self._parsed.get(folder, ())
                if suffix == volume.suffix and set(entities) <= set(volume.entities)
            ]
            for _, path in sorted(applying):
                metadata.update(self._content(path))
        return metadata

    def frame(self, volume: _Volume) -> str:
        """The frame of reference a raw scan's own sidecar names, else ``""``: what was resampled left it."""
        path = volume.path.with_name(f"{volume.stem}.json")
        if volume.derivative or path.name not in {p.name for p, *_ in self._parsed.get(path.parent, ())}:
            return ""
        frame = self._content(path).get("FrameOfReferenceUID")
        return frame.strip() if isinstance(frame, str) else ""

    def _content(self, path: Path) -> dict[str, Any]:
        if path not in self._read:
            try:
                self._read[path] = read_mapping(path, most_bytes=SIDECAR_BYTES)
            except ValueError as error:
                self._read[path] = {}
                self.unreadable.append((path, f"a sidecar that says nothing: {error}"))
        return self._read[path]


# -- the tree ------------------------------------------------------------------------------------------------


def _read_tree(root: Path) -> _Tree:
    tree = _Tree()
    # the root is named by the user: that makes it a data set even where the description was lost
    lost = any(entry.is_dir() and entry.name.startswith("sub-") for entry in _entries(root))
    tree.datasets = lost
    _walk(root, root, tree, top=root if lost else None, dataset="", derivative="", above=())
    return tree


def _walk(
    folder: Path,
    root: Path,
    tree: _Tree,
    *,
    top: Path | None,
    dataset: str,
    derivative: str,
    above: tuple[tuple[int, int], ...],
) -> None:
    """Add what a folder holds; links to folders are followed, but never in a circle."""
    state = folder.stat()
    if (state.st_dev, state.st_ino) in above:
        return
    above = (*above, (state.st_dev, state.st_ino))
    entries = _entries(folder)
    relative = folder.relative_to(root)
    if "derivatives" not in relative.parts and any(entry.name == DESCRIPTION for entry in entries):
        top, dataset = folder, "" if folder == root else relative.as_posix()
        tree.datasets = True
        derivative = folder.name if _is_derivative(folder / DESCRIPTION, tree) else ""
    elif folder.parent.name == "derivatives" and "derivatives" in relative.parts[:-1]:
        # some leave out the folder of the pipeline
        flat = folder.name.startswith("sub-")
        derivative, top = ("derivatives", folder.parent) if flat else (folder.name, folder)
    elif folder.name == "derivatives" and folder != root:
        derivative = derivative or "derivatives"
    for entry in entries:
        path = folder / entry.name
        if entry.is_dir():
            _walk(path, root, tree, top=top, dataset=dataset, derivative=derivative, above=above)
        elif entry.name.endswith(".json"):
            tree.sidecars.setdefault(folder, []).append(entry.name)
        elif is_nifti_name(path):
            tree.volumes.append(_volume(path, root, top=top, dataset=dataset, derivative=derivative))


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What a folder holds, in order of names, hidden files left out (``.git`` of a DataLad tree holds copies)."""
    try:
        with os.scandir(folder) as found:
            return sorted((e for e in found if not e.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"cannot read the folder {folder}: {error.strerror or error}") from error


def _volume(path: Path, root: Path, *, top: Path | None, dataset: str, derivative: str) -> _Volume:
    stem = nifti_stem(path)
    place = None
    if top is not None:
        parts = path.parent.relative_to(top).parts
        # a derivative may have folders of its own before the subject's
        first = next((i for i, part in enumerate(parts) if part.startswith("sub-")), 0) if derivative else 0
        place = _PLACE.fullmatch("/".join(parts[first:]))
    entities, suffix = _parse_name(stem)
    return _Volume(
        path=path,
        relative=path.relative_to(root).as_posix(),
        stem=stem,
        top=top or root,
        dataset=dataset,
        derivative=derivative,
        subject=place["subject"] if place else "",
        session=(place["session"] or "") if place else "",
        datatype=place["datatype"] if place else "",
        entities=entities,
        suffix=suffix,
    )


def _parse_name(stem: str) -> tuple[tuple[tuple[str, str], ...], str]:
    """Entities and suffix of a name; no entities are fine (``T1w.json``), no suffix means no BIDS name."""
    found = _NAME.fullmatch(stem)
    if found is None:
        return (), stem if re.fullmatch("[A-Za-z0-9]+", stem) else ""
    pairs = (part.split("-", 1) for part in found["entities"].split("_"))
    return tuple((key, value) for key, value in pairs), found["suffix"]


def _is_derivative(description: Path, tree: _Tree) -> bool:
    try:
        return read_mapping(description, most_bytes=SIDECAR_BYTES).get("DatasetType") == "derivative"
    except ValueError as error:
        tree.rejected.append((description, f"a description that says nothing: {error}"))
        return False


def _below(dataset: str, name: str) -> str:
    return "/".join(filter(None, (dataset, name)))


def _nothing_found(root: Path, tree: _Tree, rejected: Sequence[tuple[Path, str]]) -> str:
    if not tree.datasets:
        return f"no scan below {root}: it holds no {DESCRIPTION} and no folder sub-<label>, so it is no BIDS data set"
    if not rejected:
        return f"no scan below {root}: its BIDS data set holds no NIfTI file"
    path, reason = rejected[0]
    return f"no scan below {root}: of {len(rejected)} files none is one; {path.name}: {reason}"
