"""A BIDS tree on disk: its data sets, the volumes in them, their JSON sidecars; what is a scan is decided elsewhere."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medseg_ssl.config import UserError
from medseg_ssl.data.nifti import is_nifti_name, nifti_stem
from medseg_ssl.data.sources._json import read_mapping

logger = logging.getLogger(__name__)

SIDECAR_BYTES = 16 * 2**20
"""A sidecar holds parameters, at most the frame times of a long PET; one that is larger is not read."""

DESCRIPTION = "dataset_description.json"
_LABEL = r"[A-Za-z0-9+]+"
_PLACE = re.compile(rf"(?P<subject>sub-{_LABEL})(?:/(?P<session>ses-{_LABEL}))?/(?P<datatype>[A-Za-z0-9]+)")
_NAME = re.compile(rf"(?P<entities>[a-z]+-{_LABEL}(?:_[a-z]+-{_LABEL})*)_(?P<suffix>[A-Za-z0-9]+)")


@dataclass(frozen=True)
class BIDSVolume:
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
class BIDSTree:
    """What lies below a root.

    Attributes:
        volumes: every NIfTI file.
        sidecars: folder to the names of the JSON files in it.
        rejected: files that could not be looked into, with the reason.
        datasets: whether there is a data set.
    """

    volumes: list[BIDSVolume] = field(default_factory=list)
    sidecars: dict[Path, list[str]] = field(default_factory=dict)
    rejected: list[tuple[Path, str]] = field(default_factory=list)
    datasets: bool = False


class Sidecars:
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

    def of(self, volume: BIDSVolume) -> dict[str, Any]:
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

    def frame(self, volume: BIDSVolume) -> str:
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


def read_tree(root: Path) -> BIDSTree:
    tree = BIDSTree()
    # the root is named by the user: that makes it a data set even where the description was lost
    lost = any(_is_folder(entry) and entry.name.startswith("sub-") for entry in _entries(root))
    tree.datasets = lost
    _walk(root, root, tree, top=root if lost else None, dataset="", derivative="", above=())
    return tree


def _walk(
    folder: Path,
    root: Path,
    tree: BIDSTree,
    *,
    top: Path | None,
    dataset: str,
    derivative: str,
    above: tuple[tuple[int, int], ...],
) -> None:
    """Add what a folder holds; links to folders are followed, but never in a circle.

    A folder below the root that cannot be read is left out with a warning.
    """
    try:
        state = folder.stat()
        if (state.st_dev, state.st_ino) in above:
            return
        entries = _entries(folder)
    except (OSError, UserError) as error:
        if folder == root:
            raise
        logger.warning("left out: %s", error)
        return
    above = (*above, (state.st_dev, state.st_ino))
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
        if _is_folder(entry):
            _walk(path, root, tree, top=top, dataset=dataset, derivative=derivative, above=above)
        elif entry.name.endswith(".json"):
            tree.sidecars.setdefault(folder, []).append(entry.name)
        elif is_nifti_name(path):
            tree.volumes.append(_volume(path, root, top=top, dataset=dataset, derivative=derivative))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What a folder holds, in order of names, hidden files left out (``.git`` of a DataLad tree holds copies)."""
    try:
        with os.scandir(folder) as found:
            return sorted((e for e in found if not e.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"cannot read the folder {folder}: {error.strerror or error}") from error


def _volume(path: Path, root: Path, *, top: Path | None, dataset: str, derivative: str) -> BIDSVolume:
    stem = nifti_stem(path)
    place = None
    if top is not None:
        parts = path.parent.relative_to(top).parts
        # a derivative may have folders of its own before the subject's
        first = next((i for i, part in enumerate(parts) if part.startswith("sub-")), 0) if derivative else 0
        place = _PLACE.fullmatch("/".join(parts[first:]))
    entities, suffix = _parse_name(stem)
    return BIDSVolume(
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


def _is_derivative(description: Path, tree: BIDSTree) -> bool:
    try:
        return read_mapping(description, most_bytes=SIDECAR_BYTES).get("DatasetType") == "derivative"
    except ValueError as error:
        tree.rejected.append((description, f"a description that says nothing: {error}"))
        return False
