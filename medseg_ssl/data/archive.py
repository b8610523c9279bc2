"""The archive: prepared volumes for random crop reads, their rows, and how both are written and read.

::

    ARCHIVE/archive.json        recipe, classes, generation, fingerprint; written last
            manifest.jsonl  cases.jsonl  pairs.jsonl  splits/NAME.json  dropped.csv  summary.json
            volumes/KEY.b2nd                int16 (D, H, W): stored · scale + offset, −32768 no data
            labels/CASE.b2nd                uint8 on the archive grid of the case's first scan
            labels/CASE.original.b2nd       uint8 on the label's own grid, its affine in the file's metadata
            private/sources.csv             salt and paths, mode 0600; the only file that knows them

Volumes are immutable and finished by a rename, so a run that was killed leaves nothing half written, and the
next one skips what is there. Writing volumes lives in ``store`` functions that need no open archive (worker
processes); the rows are committed at the end by one ``ArchiveWriter``.
"""

from __future__ import annotations

import copy
import json
import os
from collections import OrderedDict
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from medseg_ssl.config import UserError
from medseg_ssl.data.budgets import check_split, read_split
from medseg_ssl.data.channels import cases_of
from medseg_ssl.data.intensity import Linear, Policy, linear, unit_of
from medseg_ssl.data.manifest import CaseRow, PairRow, ScanRow, Split, read_rows
from medseg_ssl.data.partial import Access, limit_label, limited_cases
from medseg_ssl.data.recipe import FORMAT, Recipe
from medseg_ssl.data.store import NO_DATA, open_array, read_box
from medseg_ssl.types import MODALITIES, Facts, Triple, TripleMm

ROWS = {"manifest.jsonl": ScanRow, "cases.jsonl": CaseRow, "pairs.jsonl": PairRow}
_OPEN_FILES = 128


class Archive:
    """A prepared archive, open for reading; cheap to pickle and safe in forked and spawned workers.

    Attributes:
        path: its folder.
        recipe: how it was prepared.
        fingerprint: sha256 over recipe, content of its scans and generation.
        generation: number of times its rows changed.
        classes: class names, background first; ``()`` without labels.
        scans: scan key to row.
        cases: case key to row.
        pairs: declared and derived relations.
    """

    def __init__(
        self,
        path: Path,
        recipe: Recipe,
        *,
        fingerprint: str,
        generation: int,
        classes: tuple[str, ...],
        scans: Iterable[ScanRow],
        cases: Iterable[CaseRow],
        pairs: Iterable[PairRow],
    ) -> None:
        self.path, self.recipe = Path(path), recipe
        self.fingerprint, self.generation, self.classes = fingerprint, generation, classes
        self.scans = {row.key: row for row in scans}
        self.cases = {row.case: row for row in cases}
        self.pairs = list(pairs)
        self._access = Access()
        self._files: OrderedDict[Path, Any] = OrderedDict()
        self._process = os.getpid()

    @classmethod
    def open(cls, path: Path) -> Archive:
        """Open an archive.

        Raises:
            UserError: not an archive, of another format, damaged, or left half updated.
        """
        path = Path(path)
        head = read_head(path)
        try:
            recipe = Recipe.model_validate(head["recipe"])
            known = dict(
                fingerprint=str(head["fingerprint"]),
                generation=int(head["generation"]),
                classes=tuple(head["classes"]),
            )
            stated = head["rows"]
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"archive {path} is damaged ({_clause(error)}); run prepare again") from error
        rows = {
            name: read_rows(path / name, kind, digest=stated.get(name, "")) for name, kind in ROWS.items()
        }
        return cls(
            path,
            recipe,
            scans=rows["manifest.jsonl"],  # pyright: ignore[reportArgumentType]
            cases=rows["cases.jsonl"],  # pyright: ignore[reportArgumentType]
            pairs=rows["pairs.jsonl"],  # pyright: ignore[reportArgumentType]
            **known,  # pyright: ignore[reportArgumentType]
        )

    def __getstate__(self) -> dict[str, Any]:
        """Everything but open files."""
        return {**self.__dict__, "_files": OrderedDict(), "_process": -1}

    def limited(self, access: Access) -> Archive:
        """A copy that reads with other splits, cases of other channels, or labels of which only a part is known.

        Raises:
            UserError: a part of a label that the archive does not have, or no labeled case of these channels.
        """
        if access == Access():
            return self
        unknown = [case for case in access.labels if case not in self.cases or not self.cases[case].labeled]
        if unknown:
            raise UserError(f"{self.path} has no labeled case {unknown[0]!r}")
        other = copy.copy(self)
        other._access = access
        if access.channels:
            other.cases = cases_of(self.cases, self.scans, self.pairs, access.channels)
            if not any(row.labeled for row in other.cases.values()):
                first, *others = access.channels
                labeled = [row for row in self.cases.values() if row.labeled]
                kinds = {"+".join(self.scans[key].modality for key in row.scans) for row in labeled}
                join = (
                    f", and no labeled {first} scan to join with one scan each of {' and '.join(others)} in the same"
                    " coordinates"
                )
                raise UserError(
                    f"archive {self.path} has no labeled case of {'+'.join(access.channels)}{join if others else ''};"
                    f" it has labeled cases of {', '.join(sorted(kinds)) or 'nothing'}"
                )
        other.cases = dict(limited_cases(other.cases, self.classes, access))
        return other

    # -- facts -----------------------------------------------------------------------------------------------

    @property
    def members(self) -> tuple[Archive, ...]:
        """The archives whose scans these are: this one, but for a mixture."""
        return (self,)

    @cached_property
    def intensity(self) -> dict[str, Policy]:
        """The policy of each modality that occurs; raw PET without any SUV gets a robust z-score."""
        found = self.recipe.policies()
        units: dict[str, set[str]] = {}
        for row in self.scans.values():
            units.setdefault(row.modality, set()).add(unit_of(row))
        for modality, seen in units.items():
            if found[modality].kind in ("window", "suv_window") and seen == {"raw"}:
                found[modality] = Policy(kind="robust_zscore")
        return {modality: found[modality] for modality in sorted(units)}

    def linear(self, key: str) -> Linear:
        """The clipped line that normalises a scan, in physical units."""
        row = self.scans[key]
        return linear(self.intensity[row.modality], row.statistics, unit=unit_of(row))

    def facts(self) -> Facts:
        """What networks and objectives must know.

        Raises:
            UserError: labeled cases with different numbers of channels.
        """
        counts = {len(case.scans) for case in self.cases.values() if case.labeled}
        if len(counts) > 1:
            raise UserError(
                f"archive {self.path} has labeled cases of {sorted(counts)} channels; they must be equal"
            )
        return Facts(
            channels=counts.pop() if counts else 1,
            classes=self.classes,
            modalities=tuple(m for m in MODALITIES if any(r.modality == m for r in self.scans.values())),
            relations=tuple(sorted({pair.relation for pair in self.pairs})),
        )

    def reference_spacing_mm(self, split: str = "default") -> TripleMm:
        """The archive's voxel size (D, H, W); the median of the training subjects' scans where each keeps its own."""
        if self.recipe.spacing_mm is not None:
            return self.recipe.spacing_mm
        train = set(self.split(split).train)
        own = [row.spacing_mm for row in self.scans.values() if row.subject in train]
        d, h, w = (
            float(v)
            for v in np.round(np.median(own or [r.spacing_mm for r in self.scans.values()], axis=0), 6)
        )
        return d, h, w

    def split(self, name: str = "default") -> Split:
        """A split of this archive.

        Raises:
            UserError: no split of this name, or one with a subject in two lists or one unknown here.
        """
        subjects = {row.subject for row in self.scans.values()}
        for given in self._access.splits:
            if given.name == name:
                return check_split(given, known=subjects)
        return read_split(self.path / "splits" / f"{name}.json", known=subjects)

    # -- voxels ----------------------------------------------------------------------------------------------

    def read(self, key: str, start: Triple, size: Triple) -> np.ndarray:
        """Read a box of a scan: int16 (D, H, W) of ``size``; ``NO_DATA`` outside the volume.

        Raises:
            KeyError: no such scan.
            UserError: the volume's file is missing or damaged.
        """
        if key not in self.scans:
            raise KeyError(f"no scan {key!r} in archive {self.path}")
        return self._box(Path("volumes") / f"{key}.b2nd", start, size, outside=NO_DATA)

    def read_label(self, case: str, start: Triple, size: Triple) -> np.ndarray:
        """Read a box of a label on the archive grid: uint8 (D, H, W) of ``size``; 0 outside the volume.

        Raises:
            KeyError: no such labeled case.
            UserError: the label's file is missing or damaged.
        """
        self._labeled(case)
        label_DHW = self._box(Path("labels") / f"{case}.b2nd", start, size, outside=0)
        return self._known_part(
            case, label_DHW, np.array(self.scans[self.cases[case].scans[0]].affine_44), start
        )

    def original_label(self, case: str) -> tuple[np.ndarray, np.ndarray]:
        """The label on its own grid: uint8 (D, H, W) and its float64 affine.

        Raises:
            KeyError: no such labeled case.
            UserError: the label's file is missing or damaged.
        """
        self._labeled(case)
        name = Path("labels") / f"{case}.original.b2nd"
        array = self._file(name)
        try:
            label_DHW, affine_44 = array[...], np.array(array.schunk.vlmeta["affine_44"], dtype=np.float64)
        except (RuntimeError, KeyError, OSError, ValueError) as error:
            raise UserError(f"cannot read {self.path / name}; run prepare again") from error
        return self._known_part(case, label_DHW, affine_44, (0, 0, 0)), affine_44

    def original_grid(self, case: str) -> tuple[Triple, np.ndarray]:
        """Shape and float64 affine of the label's own grid, no voxel read; without a label the first scan's grid.

        Raises:
            KeyError: no such case.
            UserError: the label's file is missing or damaged.
        """
        row = self.cases[case]
        if not row.labeled:
            first = self.scans[row.scans[0]]
            return first.shape, np.array(first.affine_44, dtype=np.float64)
        file = self._file(Path("labels") / f"{case}.original.b2nd")
        d, h, w = file.shape
        return (d, h, w), np.array(file.schunk.vlmeta["affine_44"], dtype=np.float64)

    def original_spacing_mm(self, case: str) -> TripleMm:
        """Voxel size (D, H, W) of the label's own grid.

        Raises:
            KeyError: no such labeled case.
        """
        self._labeled(case)
        d, h, w = np.linalg.norm(self.original_grid(case)[1][:3, :3], axis=0)
        return float(d), float(h), float(w)

    def _known_part(
        self, case: str, label_DHW: np.ndarray, affine_44: np.ndarray, start: Triple
    ) -> np.ndarray:
        part = self._access.labels.get(case)
        if part is None:
            return label_DHW
        row_4 = (np.linalg.inv(self.original_grid(case)[1]) @ affine_44)[0]
        return limit_label(label_DHW, part, classes=self.classes, row_4=row_4, start=start)

    def _labeled(self, case: str) -> None:
        if case not in self.cases or not self.cases[case].labeled:
            raise KeyError(f"no labeled case {case!r} in archive {self.path}")

    def _file(self, name: Path) -> Any:
        if self._process != os.getpid():
            # a forked worker must not share file offsets with its parent
            self._files, self._process = OrderedDict(), os.getpid()
        if name in self._files:
            self._files.move_to_end(name)
            return self._files[name]
        array = open_array(self.path / name)
        self._files[name] = array
        if len(self._files) > _OPEN_FILES:
            self._files.popitem(last=False)
        return array

    def _box(self, name: Path, start: Triple, size: Triple, *, outside: int) -> np.ndarray:
        array = self._file(name)
        try:
            return read_box(array, start, size, outside=outside)
        except (RuntimeError, OSError, ValueError) as error:
            raise UserError(
                f"cannot read {self.path / name} ({_clause(error)}); run prepare again"
            ) from error


def read_head(path: Path) -> dict[str, Any]:
    """The content of ``archive.json``.

    Raises:
        UserError: no archive there, or one of another format.
    """
    file = Path(path) / "archive.json"
    if not file.is_file():
        reason = "no such folder" if not Path(path).is_dir() else "it has no archive.json"
        raise UserError(f"{path} is not an archive ({reason}); make one with 'medseg-ssl prepare'")
    try:
        head = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {file} ({_clause(error)}); run prepare again") from error
    if not isinstance(head, dict) or head.get("format") != FORMAT:
        found = head.get("format") if isinstance(head, dict) else type(head).__name__
        raise UserError(
            f"archive {path} has format {found!r}; this version reads {FORMAT}: run prepare again"
        )
    return head


def _clause(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]
