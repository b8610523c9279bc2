"""Writing an archive's rows: recipe check, salted keys, numbered generations, one atomic commit."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from medseg_ssl.config import ConfigError, UserError
from medseg_ssl.data.archive import Archive, read_head
from medseg_ssl.data.budgets import check_split, read_split, write_split
from medseg_ssl.data.manifest import CaseRow, PairRow, Row, ScanRow, Split
from medseg_ssl.data.recipe import FORMAT, ROWS_ONLY, Recipe, fingerprint_of, without_names
from medseg_ssl.data.store import label_hash

_KEY_LENGTH = 16
_NEXT = ".next"
"""Folder in which a commit is staged; complete once it holds ``archive.json``."""


class ArchiveWriter:
    """An archive open for writing.

    Attributes:
        path: its folder.
        recipe: the recipe of all its volumes.
        classes: class names, background first; ``()`` without labels.
        salt: secret of its keys.
        generation: of the rows on disk, 0 before the first commit.
        scans: rows of the scans on disk, by key.
        cases: rows of the cases on disk, by key.
        pairs: rows of the pairs on disk.
        coregistered_by: what their registration was asked for.
    """

    def __init__(
        self, path: Path, recipe: Recipe, classes: Sequence[str], *, salt: str, before: Archive | None
    ) -> None:
        self.path, self.recipe, self.classes, self.salt = Path(path), recipe, tuple(classes), salt
        self._remember(before)

    def _remember(self, archive: Archive | None) -> None:
        self.generation = archive.generation if archive else 0
        self.fingerprint = archive.fingerprint if archive else ""
        self.scans: dict[str, ScanRow] = dict(archive.scans) if archive else {}
        self.cases: dict[str, CaseRow] = dict(archive.cases) if archive else {}
        self.pairs: list[PairRow] = list(archive.pairs) if archive else []
        self.coregistered_by = (archive.recipe if archive else self.recipe).coregister

    @classmethod
    def open(cls, path: Path, recipe: Recipe, classes: Sequence[str] = ()) -> ArchiveWriter:
        """Create an archive's folders, or open the one that is there to go on with it.

        Raises:
            ConfigError: the archive there has another recipe or other classes (every difference is named).
            UserError: the folder holds something else, lost its private file, or cannot be written.
        """
        path = Path(path)
        before: Archive | None = None
        wanted = {**recipe.model_dump(mode="json"), "classes": list(classes)}
        started = path / "private" / "recipe.json"
        try:
            if started.is_file():
                _finish_commit(path)
                _sweep(path)
            if (path / "archive.json").exists():
                head = read_head(path)
                there = _completed({**head["recipe"], "classes": head["classes"]})
                # registration touches rows alone, so it may be asked for later
                _same_recipe(path, {**there, "coregister": wanted["coregister"]}, wanted)
                before = Archive.open(path)
            elif started.is_file():
                # an interrupted first run: volumes exist, rows do not
                # (rows decide about split and intensity, so these may still change)
                begun = _completed(json.loads(started.read_text(encoding="utf-8")))
                _same_recipe(path, {**begun, **{key: wanted[key] for key in ROWS_ONLY}}, wanted)
            elif path.exists() and (not path.is_dir() or any(path.iterdir())):
                raise UserError(f"{path} exists and is no archive; choose another --out")
            for folder in ("volumes", "labels", "splits", "private"):
                (path / folder).mkdir(parents=True, exist_ok=True)
            (path / "private").chmod(0o700)
            salt = _salt(path, fresh=before is None)
            _write(started, json.dumps(wanted, indent=1) + "\n", mode=0o600)
        except OSError as error:
            raise UserError(f"cannot write archive {path}: {error.strerror or error}") from error
        return cls(path, recipe, classes, salt=salt, before=before)

    def split(self, name: str = "default") -> Split | None:
        """A split that is on disk, None where there is none.

        Raises:
            UserError: the file is no valid split.
        """
        file = self.path / "splits" / f"{name}.json"
        return read_split(file) if file.is_file() else None

    def key(self, *parts: str) -> str:
        """The salted key of a source name, such as (root, subject, path)."""
        text = "\0".join((self.salt, *parts))
        return hashlib.sha256(text.encode()).hexdigest()[:_KEY_LENGTH]

    def commit(
        self,
        scans: Iterable[ScanRow],
        cases: Iterable[CaseRow],
        pairs: Iterable[PairRow],
        *,
        splits: Iterable[Split] = (),
        sources: Mapping[str, str] | None = None,
        dropped: Iterable[tuple[str, str]] = (),
        summary: Mapping[str, Any] | None = None,
    ) -> Archive:
        """Write all rows, ``archive.json`` last; the generation grows where the content changed.

        Args:
            scans: every scan of the archive, not only new ones; new ones get this generation's number.
            cases: every case.
            pairs: every pair.
            splits: splits to write beside those there.
            sources: key to source path, added to ``private/sources.csv`` and to nothing else.
            dropped: key and reason of every dropped file.
            summary: counts for ``summary.json``.

        Raises:
            UserError: a row names a subject, scan or class that is not there, a split is wrong, or the disk
                is full.
        """
        scans = sorted(scans, key=lambda row: row.key)
        cases = sorted(cases, key=lambda row: row.case)
        pairs = sorted(pairs, key=lambda row: (row.scan_a, row.scan_b, row.relation))
        splits = list(splits)
        self._check(scans, cases, pairs, splits=splits)
        labels = [label_hash(self.path, case.case) for case in cases if case.labeled]
        generation, fingerprint = self.generation, self._fingerprint(scans, labels, self.generation)
        if not generation or fingerprint != self.fingerprint:
            generation += 1
            fingerprint = self._fingerprint(scans, labels, generation)
        scans = [r if self._has(r) else r.model_copy(update={"generation": generation}) for r in scans]
        head = {
            "format": FORMAT,
            "generation": generation,
            "fingerprint": fingerprint,
            "classes": list(self.classes),
            "recipe": self.recipe.model_dump(mode="json"),
        }
        rows = {"manifest.jsonl": scans, "cases.jsonl": cases, "pairs.jsonl": pairs}
        self._save(rows, splits, sources=sources, dropped=dropped, summary=summary, head=head)
        archive = Archive(
            self.path,
            self.recipe,
            fingerprint=fingerprint,
            generation=generation,
            classes=self.classes,
            scans=scans,
            cases=cases,
            pairs=pairs,
        )
        self._remember(archive)
        return archive

    def _has(self, row: ScanRow) -> bool:
        return row.key in self.scans and self.scans[row.key].content_hash == row.content_hash

    def _fingerprint(self, scans: Iterable[ScanRow], labels: Iterable[str], generation: int) -> str:
        return fingerprint_of(self.recipe, self.classes, scans=scans, labels=labels, generation=generation)

    def _save(
        self,
        rows: Mapping[str, Iterable[Row]],
        splits: Sequence[Split],
        *,
        sources: Mapping[str, str] | None,
        dropped: Iterable[tuple[str, str]],
        summary: Mapping[str, Any] | None,
        head: Mapping[str, Any],
    ) -> None:
        staged = self.path / _NEXT
        try:
            if sources is not None:
                known = {key: place for key, place in _private(self.path) if key != "salt"}
                private = [("salt", self.salt), *sorted({**known, **sources}.items())]
                _write(self.path / "private" / "sources.csv", _csv(("key", "path"), private), mode=0o600)
            # all of it is on disk before any of it replaces what is there
            shutil.rmtree(staged, ignore_errors=True)
            staged.mkdir()
            digests = {name: _write_rows(staged / name, kind) for name, kind in rows.items()}
            for split in splits:
                write_split(staged / "splits", split)
            _write(staged / "dropped.csv", _csv(("key", "reason"), dropped))
            _write(staged / "summary.json", json.dumps(dict(summary or {}), indent=1) + "\n")
            _write(staged / "archive.json", json.dumps({**head, "rows": digests}, indent=1) + "\n")
            _finish_commit(self.path)
        except OSError as error:
            raise UserError(
                f"cannot write archive {self.path}: {error.strerror or error}; is the disk full?"
            ) from error

    def _check(
        self,
        scans: Sequence[ScanRow],
        cases: Sequence[CaseRow],
        pairs: Sequence[PairRow],
        *,
        splits: Sequence[Split],
    ) -> None:
        owner = {row.key: row.subject for row in scans}
        if len(owner) != len(scans):
            raise UserError("two scans have the same key; the source lists a file twice")
        for case in cases:
            missing = [key for key in case.scans if owner.get(key) != case.subject]
            if missing:
                raise UserError(f"case {case.case} names scan {missing[0]}, which its subject does not have")
            if case.labeled and len(case.known_classes) != len(self.classes):
                raise UserError(
                    f"case {case.case} states {len(case.known_classes)} classes of {len(self.classes)}"
                )
        for pair in pairs:
            if pair.scan_a not in owner or owner.get(pair.scan_a) != owner.get(pair.scan_b):
                raise UserError(f"pair {pair.scan_a} and {pair.scan_b} is not of one subject of the archive")
        for split in splits:
            check_split(split, known=set(owner.values()))


def _finish_commit(path: Path) -> None:
    """Move the staged files of a commit in, ``archive.json`` last; also those of a commit that was killed.

    Staged files without ``archive.json`` are of a commit that never got that far: they are removed.
    """
    staged = path / _NEXT
    if (staged / "archive.json").is_file():
        for file in sorted(staged.rglob("*")):
            if file.is_file() and file != staged / "archive.json":
                target = path / file.relative_to(staged)
                target.parent.mkdir(exist_ok=True)
                os.replace(file, target)
        os.replace(staged / "archive.json", path / "archive.json")
    shutil.rmtree(staged, ignore_errors=True)


def _sweep(path: Path) -> None:
    """Remove what workers that were killed in the middle of a write left behind."""
    for folder in ("volumes", "labels", "private"):
        for file in (path / folder).glob(".*.part"):
            file.unlink(missing_ok=True)


def _completed(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A stored recipe with the defaults of keys that did not exist when it was written."""
    recipe = {key: value for key, value in tree.items() if key != "classes"}
    # an earlier version kept some of the names that a recipe must not hold
    recipe["source"] = without_names(recipe.get("source"))
    with contextlib.suppress(ValidationError):  # of another version: the comparison names what differs
        recipe = Recipe.model_validate(recipe).model_dump(mode="json")
    return {**recipe, "classes": tree.get("classes")}


def _same_recipe(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    here, there = _flat(wanted), _flat(found)
    different = sorted(k for k in here.keys() | there.keys() if here.get(k) != there.get(k))
    if different:
        shown = "; ".join(f"{k}: {there.get(k)!r} there, {here.get(k)!r} now" for k in different)
        raise ConfigError(f"archive {path} was prepared with another recipe ({shown}); choose another --out")


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out.update(
            _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
        )
    return out


def _private(path: Path) -> list[tuple[str, str]]:
    """Rows of the private file: the salt, then keys and paths."""
    file = path / "private" / "sources.csv"
    if not file.is_file():
        return []
    with file.open(newline="", encoding="utf-8") as handle:
        return [(row[0], row[1]) for row in csv.reader(handle) if len(row) == 2][1:]


def _salt(path: Path, *, fresh: bool) -> str:
    found = dict(_private(path)).get("salt")
    if found:
        return found
    file = path / "private" / "sources.csv"
    if not fresh:
        raise UserError(
            f"{file} lost its salt, without which keys would not match; restore it or prepare anew"
        )
    salt = secrets.token_hex(16)
    _write(file, _csv(("key", "path"), [("salt", salt)]), mode=0o600)
    return salt


def _csv(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return out.getvalue()


def _write_rows(path: Path, rows: Iterable[Row]) -> str:
    """Write rows into a staged file (nothing reads it before the commit is whole); returns its sha256."""
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for row in rows:  # one at a time: a manifest of a million scans is 1.5 GB
            data = row.model_dump_json().encode() + b"\n"
            digest.update(data)
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _write(path: Path, text: str, *, mode: int = 0o644) -> None:
    """Write a text file whole or not at all; a private one is never readable by others."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
