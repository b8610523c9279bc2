"""Medical Segmentation Decathlon layout (arXiv 1902.09063): dataset.json, images and labels Tr and Ts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medseg_ssl.config import UserError
from medseg_ssl.data.sources._kinds import Kind, kind_of
from medseg_ssl.data.sources._labels import (
    TaskConfig,
    check_reserved,
    class_values,
    numbered,
    read_task,
    reserved_subjects,
)
from medseg_ssl.data.sources.base import Listing, RawCase, Source


class MSD(Source):
    """A Decathlon task; images of several channels are 4D files, one scan per channel."""

    Config = TaskConfig
    config: TaskConfig

    def list(self, root: Path) -> Listing:
        """List a task folder.

        Raises:
            UserError: no dataset.json, or it does not say what the Decathlon's says.
        """
        root = Path(root)
        task = read_task(root)
        names = numbered(task, ("modality",), root)
        channels = tuple(kind_of(name, self.config.modalities) for name in names.values())
        classes = numbered(task, ("labels",), root)
        rejected: list[tuple[Path, str]] = []
        cases, listed, train, test = [], set(), set(), set()
        for image, label, reserved in _entries(task, root):
            listed.add(image)
            if not image.is_file():
                rejected.append((image, "dataset.json names it, but there is no such file"))
                continue
            if label is not None and not label.is_file():
                rejected.append((label, "dataset.json names it, but there is no such file"))
                label = None
            case = self._case(image, label, channels)
            subject = case.scans[0].subject
            if reserved and self.config.cases_per_subject > 1 and subject in train:
                rejected.append(
                    (image, "another case of its subject is in imagesTr; a subject is in one part only")
                )
                continue
            cases.append(case)
            (test if reserved else train).add(subject)
        for folder in ("imagesTr", "imagesTs"):
            files = sorted((root / folder).glob("*.nii*"))
            rejected += [
                (p, "dataset.json does not name it") for p in files if p not in listed and p.name[0] != "."
            ]
        if not cases:
            raise UserError(
                f"no scan in {root}: dataset.json names {len(listed)} images, and none of them is there"
            )
        check_reserved(train, test, root)
        reserved, unknown = reserved_subjects(self.config.test_subjects, cases)
        return Listing(
            cases=tuple(cases),
            classes=classes if any(c.label for c in cases) else {},
            relation="registered" if len(channels) > 1 else None,
            unknown_when_absent=class_values(self.config.unknown_when_absent, classes),
            rejected=tuple(rejected),
            test_subjects=reserved | test,
            unknown_test_subjects=unknown,
        )

    def _case(self, image: Path, label: Path | None, channels: tuple[Kind, ...]) -> RawCase:
        name = re.sub(r"\.nii(\.gz)?$", "", image.name)
        several = len(channels) > 1
        scans = self.config.scans(name, [image] * len(channels), channels, in_one_file=several)
        return RawCase(name, scans, label)


def _entries(task: dict[str, Any], root: Path) -> Iterator[tuple[Path, Path | None, bool]]:
    """(image, label or None, reserved for test) of each case that dataset.json names."""
    for item in task.get("training") or ():
        if not isinstance(item, dict) or "image" not in item:
            raise UserError(
                f"{root / 'dataset.json'}: an entry of 'training' must hold image and label, got {item!r}"
            )
        label = item.get("label")
        yield _below(root, item["image"]), _below(root, label) if label else None, False
    for item in task.get("test") or ():
        image = _below(root, item["image"] if isinstance(item, dict) else item)
        label = root / "labelsTs" / image.name
        yield image, label if label.is_file() else None, True


def _below(root: Path, name: object) -> Path:
    path = root / str(name)
    if not path.resolve().is_relative_to(root.resolve()):
        raise UserError(f"{root / 'dataset.json'} names {str(name)!r}, which lies outside of {root}")
    return path
