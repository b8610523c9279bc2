"""A folder of DICOM files as a PACS exports them: sorted by what their headers state, not by folders or names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from medseg_ssl.config import UserError
from medseg_ssl.data.dicom import suv
from medseg_ssl.data.dicom.headers import Plane, Regions, guarded, open_header, read_planes
from medseg_ssl.data.dicom.pixels import place
from medseg_ssl.data.dicom.regions import called_by
from medseg_ssl.data.dicom.series import Stack, stacks
from medseg_ssl.data.nifti import BadScan
from medseg_ssl.data.sources._labels import class_values
from medseg_ssl.data.sources.base import Listing, RawCase, RawScan, Source, SourceConfig
from medseg_ssl.fanout import map_tasks

_CHUNK = 100
"""Files that a worker looks at in one go."""
_MANY = 2000


class DicomConfig(SourceConfig):
    """How a tree of DICOM files is read.

    Attributes:
        modalities: kinds of scans to take.
        minimum_slices: a stack with fewer slices is no volume.
        repeats: of a series with several time points at one place, ``all`` become scans, or the ``first``.
        regions: class name to regular expressions of region names (whole, any case) in RTSTRUCT and SEG objects;
            classes are numbered from 1 in this order, and where regions overlap the later wins. Empty: no labels.
        unknown_when_absent: classes (values or names) that are unknown, not absent, in a case without them.
        test_subjects: patients reserved for test.
    """

    modalities: tuple[Literal["CT", "MR", "PT"], ...] = ("CT", "MR", "PT")
    minimum_slices: int = Field(default=4, ge=2)
    repeats: Literal["all", "first"] = "all"
    regions: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    unknown_when_absent: tuple[int | str, ...] = ()
    test_subjects: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _patterns(self) -> DicomConfig:
        for name, patterns in self.regions.items():
            for pattern in patterns:
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise ValueError(
                        f"regions.{name}: {pattern!r} is no regular expression ({error})"
                    ) from None
        return self

    @property
    def classes(self) -> dict[int, str]:
        """Label value to class name, without the background."""
        return dict(enumerate(self.regions, start=1))


class Dicom(Source):
    """Scans found by their headers below a root."""

    Config = DicomConfig
    config: DicomConfig

    def list(self, root: Path) -> Listing:
        """List the volumes below ``root``; only headers are read.

        Raises:
            UserError: the root is missing, or none of its files belongs to a volume.
        """
        found = self.list_files(self.files(Path(root)))
        if not found.cases:
            raise UserError(_nothing_found(Path(root), found.rejected))
        unknown = set(self.config.test_subjects) - {case.scans[0].subject for case in found.cases}
        if unknown:
            raise UserError(f"source.test_subjects names {sorted(unknown)[0]!r}, which is not below {root}")
        return found

    def list_files(self, files: Iterable[Path]) -> Listing:
        """List the volumes among some files; there may be none."""
        planes: list[Plane] = []
        drawings: list[Regions] = []
        rejected: list[tuple[Path, str]] = []
        paths = [path for path in files if not path.name.startswith(".")]
        for path, found in zip(paths, self._headers(paths), strict=True):
            if isinstance(found, str):
                rejected.append((path, found))
            elif isinstance(found, Regions):
                drawings.append(found)
            elif found[0].modality not in self.config.modalities:
                rejected.append((path, f"modality {found[0].modality}, which source.modalities leaves out"))
            else:
                planes += found
        made, refused = stacks(planes, minimum_slices=self.config.minimum_slices, repeats=self.config.repeats)
        whole: list[Stack] = []
        for stack in made:
            try:
                place(stack)
                whole.append(stack)
            except BadScan as error:
                refused.append((stack.planes, error.reason))
        used = {plane.path for stack in whole for plane in stack.planes}
        for group, reason in refused:
            rejected += [(path, reason) for path in dict.fromkeys(p.path for p in group) if path not in used]
        scans = [(stack, _scan(stack)) for stack in whole]
        cases, left = self._cases(scans, drawings)
        rejected += left
        return Listing(
            cases=tuple(cases),
            classes={0: "background", **self.config.classes} if self.config.regions else {},
            unknown_when_absent=class_values(self.config.unknown_when_absent, self.config.classes),
            rejected=tuple(dict(rejected).items()),
            test_subjects=frozenset(self.config.test_subjects),
        )

    def _headers(self, paths: Sequence[Path]) -> Iterator[list[Plane] | Regions | str]:
        """What each file holds, or why it is of no use; many files are read side by side."""
        chunks = [paths[i : i + _CHUNK] for i in range(0, len(paths), _CHUNK)]
        fan_out, done = self.fan_out, 0

        def tick(index: int, result: object) -> None:
            nonlocal done
            done += len(chunks[index])
            if fan_out.on_progress is not None:
                fan_out.on_progress(done, len(paths))

        few = len(paths) < _MANY  # starting processes takes as long
        read = map_tasks(
            look_at,
            chunks,
            workers=1 if few else fan_out.workers,
            engine="local" if few else fan_out.engine,
            on_result=tick,
            describe=lambda chunk: f"{len(chunk)} files from {chunk[0]} on",
        )
        return chain.from_iterable(read)

    def _cases(
        self, scans: Sequence[tuple[Stack, RawScan]], drawings: Iterable[Regions]
    ) -> tuple[list[RawCase], list[tuple[Path, str]]]:
        """A case per scan, with the regions that were drawn on its series; drawings that belong to none."""
        names = tuple(
            (pattern, value)
            for value, patterns in enumerate(self.config.regions.values(), start=1)
            for pattern in patterns
        )
        by_series: dict[str, list[int]] = {}
        by_frame: dict[str, list[int]] = {}
        for i, (stack, _) in enumerate(scans):
            by_series.setdefault(stack.first.series, []).append(i)
            by_frame.setdefault(stack.first.frame_of_reference, []).append(i)
        labels: dict[int, Path] = {}
        left: list[tuple[Path, str]] = []
        for drawing in drawings:
            on = [i for uid in drawing.series for i in by_series.get(uid, ())]
            if not drawing.series:
                on = [i for uid in drawing.frame_of_reference for i in by_frame.get(uid, ())]
            if not names:
                left.append(
                    (drawing.path, "regions of interest; source.regions names none of them as classes")
                )
            elif not on:
                left.append((drawing.path, "regions of interest on a series that is not here or no volume"))
            elif not any(called_by(name, pattern) for name in drawing.names for pattern, _ in names):
                left.append((drawing.path, "regions of interest, none of which source.regions names"))
            elif any(i in labels for i in on):
                left.append(
                    (drawing.path, "a second object with named regions on one series; the first is kept")
                )
            else:
                labels.update(dict.fromkeys(on, drawing.path))
        cases = [
            RawCase(f"{scan.path}#{scan.slices[0][1]}", (scan,), labels.get(i), names if i in labels else ())
            for i, (_, scan) in enumerate(scans)
        ]
        return cases, left


def look_at(paths: Sequence[Path]) -> list[list[Plane] | Regions | str]:
    """What some files hold, by their headers, or why one is of no use."""
    found: list[list[Plane] | Regions | str] = []
    for path in paths:
        try:
            found.append(read_planes(path))
        except BadScan as error:
            found.append(error.reason)
    return found


def _scan(stack: Stack) -> RawScan:
    first = stack.first
    unit = "HU" if all(plane.in_hu for plane in stack.planes) else "raw"
    if first.modality == "PT" and _gives_suv(stack):
        unit = "SUV"
    token = "_".join(filter(None, (first.modality, first.contrast)))
    return RawScan(
        path=first.path,
        subject=first.subject,
        study=first.study,
        modality=first.modality,
        contrast=first.contrast,
        unit=unit,
        frame=first.frame_of_reference,
        token=token,
        slices=tuple((plane.path, plane.frame) for plane in stack.planes),
        scanner=first.scanner,
    )


def _gives_suv(stack: Stack) -> bool:
    """Whether every slice states what SUV needs: beds and slices may differ, and half a scan in SUV is none."""
    for path in dict.fromkeys(plane.path for plane in stack.planes):
        try:
            with guarded(path):
                if suv.unit_of(open_header(path, every_tag=True))[0] != "SUV":
                    return False
        except BadScan:
            return False
    return True


def _nothing_found(root: Path, rejected: Sequence[tuple[Path, str]]) -> str:
    if not rejected:
        return f"no scan below {root}: it holds no files"
    reason, count = Counter(reason for _, reason in rejected).most_common(1)[0]
    return (
        f"no scan below {root}: none of {len(rejected)} files belongs to a volume; {count} of them: {reason}"
    )
