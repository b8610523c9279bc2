"""The contract of a source: a raw set on disk in, rows of scans and labels out; it reads no voxels."""

from __future__ import annotations

import logging
import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from medseg_ssl.config import Record, UserError

logger = logging.getLogger(__name__)


class SourceConfig(Record):
    """Options every source has; each file's ``Config`` adds its own."""


@dataclass(frozen=True)
class RawScan:
    """One file, or one stack of DICOM planes, that claims to be a scan.

    Attributes:
        path: the file.
        subject: the source's own subject name (hashed before it leaves ``prepare``).
        study: the source's own study name, ``""`` where there is one study only.
        modality: one of ``types.MODALITIES``.
        contrast: ``T1w``, ``FDG``, … or ``""`` for unknown.
        unit: ``HU``, ``SUV`` or ``raw``.
        frame: name of the frame of reference within the subject, ``""`` for unknown.
        channel: position in the case's channel order.
        volume: index in the fourth dimension of a file that holds several channels; None for a 3D file.
        token: the source's own name of this kind of scan (``MR_T1``), to which declared relations refer.
        slices: file and frame of every plane of a DICOM scan, of which ``path`` is the first; empty for one file.
        no_data_mask: file on the scan's grid that is not 0 where the scan holds no data (1 = defaced); None:
            nothing is known beyond the voxels themselves.
        scanner: maker and model of the machine (``scanner_name``), ``""`` for unknown.
    """

    path: Path
    subject: str
    modality: str
    study: str = ""
    contrast: str = ""
    unit: str = "raw"
    frame: str = ""
    channel: int = 0
    volume: int | None = None
    token: str = ""
    slices: tuple[tuple[Path, int], ...] = ()
    no_data_mask: Path | None = None
    scanner: str = ""


@dataclass(frozen=True)
class RawRelation:
    """The declared relation between two scans of one subject."""

    scan_a: RawScan
    scan_b: RawScan
    relation: str


@dataclass(frozen=True)
class RawCase:
    """Scans that go in together, in channel order, with one label file (or none).

    Attributes:
        regions: of a label file that draws named regions (RTSTRUCT, SEG): regular expression of a name, label value.
    """

    name: str
    scans: tuple[RawScan, ...]
    label: Path | None = None
    regions: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Listing:
    """What a source found.

    Attributes:
        cases: one per labeled or unlabeled case; an unlabeled scan is a case of its own.
        classes: label value to name, 0 is background; empty without labels.
        relation: declared relation between scans of one study (``registered`` …), None: derived from
            geometry.
        relations: relations declared pair by pair; they go before ``relation`` and before geometry.
        unknown_when_absent: label values that nobody stated in a case where they do not occur (not contoured
            there), in place of being known as absent.
        ignored_values: label values of voxels that nobody classified (nnU-Net's ``ignore``).
        rejected: files that cannot be a scan, with the reason.
        test_subjects: subjects a source reserves for test (a public test split), never used for training.
        unknown_test_subjects: names of the config for such subjects that this root does not hold; another may.
    """

    cases: tuple[RawCase, ...]
    classes: dict[int, str] = field(default_factory=dict)
    relation: str | None = None
    relations: tuple[RawRelation, ...] = ()
    unknown_when_absent: frozenset[int] = frozenset()
    ignored_values: frozenset[int] = frozenset()
    rejected: tuple[tuple[Path, str], ...] = ()
    test_subjects: frozenset[str] = frozenset()
    unknown_test_subjects: frozenset[str] = frozenset()


@dataclass(frozen=True)
class FanOut:
    """What a source may use where it has to open every file.

    Attributes:
        workers: processes.
        engine: ``local`` or ``ray``.
        on_progress: called with (files looked at, files in all).
    """

    workers: int = 1
    engine: str = "local"
    on_progress: Callable[[int, int], None] | None = None


class Source(ABC):
    """A layout of raw data on disk."""

    Config: ClassVar[type[SourceConfig]]

    def __init__(self, config: SourceConfig, fan_out: FanOut | None = None) -> None:
        self.config, self.fan_out = config, fan_out or FanOut()

    @abstractmethod
    def list(self, root: Path) -> Listing:
        """List a root without reading voxels.

        Raises:
            UserError: the root is missing, empty, or not of this layout; the message says what was expected.
        """

    def files(self, root: Path) -> Iterator[Path]:
        """Every file under a root, in a stable order: also behind links, and broken links, so that they are told.

        Raises:
            UserError: there is no such folder, or it cannot be read; one below it is left out with a warning.
        """
        if not Path(root).is_dir():
            raise UserError(f"no folder {root}")
        return iter(sorted(_below(Path(root))))


def _below(root: Path) -> Iterator[Path]:
    """Files below a folder, each folder once: those that lie there first, then what links lead to besides."""
    entered: set[tuple[int, int]] = set()
    links = deque([root])
    while links:
        folders = [links.popleft()]
        while folders:
            folder = folders.pop()
            try:
                state = folder.stat()
                if (state.st_dev, state.st_ino) in entered:
                    continue
                with os.scandir(folder) as found:
                    entries = list(found)
            except OSError as error:
                if folder == root:
                    raise UserError(f"cannot read the folder {root}: {error.strerror or error}") from error
                logger.warning("cannot read the folder %s, left out: %s", folder, error.strerror or error)
                continue
            entered.add((state.st_dev, state.st_ino))
            for entry in entries:
                path = folder / entry.name
                if os.path.isdir(
                    path
                ):  # not the path's own method, which raises in a folder that cannot be entered
                    (links if entry.is_symlink() else folders).append(path)
                elif os.path.isfile(path) or entry.is_symlink():
                    yield path
