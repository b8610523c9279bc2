"""What the sources of labeled tasks share: their options, dataset.json, class lists and the scans of a case."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from medseg_ssl.config import UserError
from medseg_ssl.data.sources._kinds import Kind
from medseg_ssl.data.sources.base import RawCase, RawScan, SourceConfig


class TaskConfig(SourceConfig):
    """How a task with a dataset.json is read.

    Attributes:
        modalities: channel name of dataset.json to its kind, for names that do not tell it (``zscore``, ``noNorm``).
        subject_regex: expression with a group ``subject``, matched against the case name; null: one subject
            per case.
        cases_per_subject: cases whose names end in neighbouring numbers are one subject's: with 2, those of 1 and 2, of
            3 and 4, and so on (left and right hippocampus of a person, say). Not together with ``subject_regex``.
        unknown_when_absent: classes (values or names) that are unknown, not absent, in a case without a voxel
            of them.
        test_subjects: subjects reserved for test, beside those of imagesTs; a case stands for its subject.
    """

    modalities: dict[str, Kind] = Field(default_factory=dict)
    subject_regex: str | None = None
    cases_per_subject: int = Field(default=1, ge=1)
    unknown_when_absent: tuple[int | str, ...] = ()
    test_subjects: tuple[str, ...] = ()

    @field_validator("subject_regex")
    @classmethod
    def _has_subject(cls, value: str | None) -> str | None:
        if value is None:
            return None
        try:
            groups = re.compile(value).groupindex
        except re.error as error:
            raise ValueError(f"{value!r} is no regular expression ({error})") from None
        if "subject" not in groups:
            raise ValueError("it needs a group (?P<subject>…)")
        return value

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        if self.cases_per_subject > 1 and self.subject_regex is not None:
            raise ValueError(
                "subject_regex and cases_per_subject both say which cases are one subject's; give one"
            )
        return self

    def scans(
        self, name: str, paths: Sequence[Path], channels: Sequence[Kind], *, in_one_file: bool
    ) -> tuple[RawScan, ...]:
        """The scans of a case, one per channel.

        Args:
            name: of the case.
            paths: file of each channel.
            channels: their kinds.
            in_one_file: whether the channels are the volumes of one 4D file.
        """
        subject = subject_of(name, self.subject_regex, per_subject=self.cases_per_subject)
        own_study = subject != name or self.cases_per_subject > 1
        return tuple(
            RawScan(
                path=path,
                subject=subject,
                study=name if own_study else "",
                modality=kind.modality,
                contrast=kind.contrast,
                unit=kind.stored_unit,
                frame=name if len(channels) > 1 else "",
                channel=i,
                volume=i if in_one_file else None,
                token=str(i),
            )
            for i, (path, kind) in enumerate(zip(paths, channels, strict=True))
        )


def reserved_subjects(
    names: Iterable[str], cases: Iterable[RawCase]
) -> tuple[frozenset[str], frozenset[str]]:
    """The subjects that a config reserves for test, by their own name or by that of one of their cases.

    Returns:
        The subjects, and the names that are neither (another root may hold them).
    """
    of_case = {case.name: case.scans[0].subject for case in cases}
    # a subject's own name goes before the case of another that happens to have it
    known = of_case | {subject: subject for subject in of_case.values()}
    wanted = set(names)
    return frozenset(known[name] for name in wanted & known.keys()), frozenset(wanted - known.keys())


def class_values(chosen: Iterable[int | str], classes: Mapping[int, str]) -> frozenset[int]:
    """Label values of classes given by value or by name.

    Raises:
        UserError: a class that the source does not have.
    """
    by_name = {name: value for value, name in classes.items()}
    values = set()
    for item in chosen:
        value = by_name.get(item) if isinstance(item, str) else item
        if value is None or value not in classes or value == 0:
            known = ", ".join(f"{v} ({n})" for v, n in sorted(classes.items()) if v)
            raise UserError(f"source.unknown_when_absent names class {item!r}; known: {known}")
        values.add(value)
    return frozenset(values)


def read_task(root: Path) -> dict[str, Any]:
    """The dataset.json of a task folder.

    Raises:
        UserError: there is no folder, no dataset.json, or it is no JSON mapping.
    """
    path = Path(root) / "dataset.json"
    if not path.parent.is_dir():
        raise UserError(f"no folder {root}")
    try:
        task = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no dataset.json in {root}; a Decathlon or nnU-Net task has one") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no valid JSON: {error}") from None
    if not isinstance(task, dict):
        raise UserError(f"{path} must hold a mapping, found {type(task).__name__}")
    return task


def numbered(task: Mapping[str, Any], keys: tuple[str, ...], root: Path) -> dict[int, str]:
    """A mapping of dataset.json from number to name, in the order of the numbers.

    Args:
        task: the file's content.
        keys: names the block may have; the first that is there counts.
        root: the task's folder, for the message.

    Raises:
        UserError: it is missing or its keys are no numbers.
    """
    block = next((task[key] for key in keys if key in task), None)
    if not isinstance(block, dict) or not block or not all(str(k).isdigit() for k in block):
        raise UserError(
            f"{Path(root) / 'dataset.json'}: {keys[0]!r} must map numbers to names, got {block!r}"
        )
    return {int(k): str(block[k]) for k in sorted(block, key=int)}


def subject_of(case: str, expression: str | None, *, per_subject: int = 1) -> str:
    """The subject a case belongs to: the group ``subject`` of an expression, the case itself, or the first of a few.

    Args:
        case: its name.
        expression: with a group ``subject``.
        per_subject: how many cases with neighbouring numbers, counted from 1, are one subject's; the first names it.

    Raises:
        UserError: the expression does not match the case's name, or it ends in no number.
    """
    if per_subject > 1:
        numbered_name = re.fullmatch(r"(.*?)(\d+)", case)
        if numbered_name is None or int(numbered_name[2]) < 1:
            raise UserError(
                f"source.cases_per_subject needs case names that end in a number from 1 on; {case!r} does not"
            )
        head, number = numbered_name.groups()
        first = (int(number) - 1) // per_subject * per_subject + 1
        return f"{head}{first}"  # without leading zeros: 9 and 10 must agree on their name
    if expression is None:
        return case
    found = re.match(expression, case)
    if found is None or not found["subject"]:
        raise UserError(f"source.subject_regex {expression!r} does not match the case name {case!r}")
    return found["subject"]


def check_reserved(training: Iterable[str], reserved: Iterable[str], root: Path) -> None:
    """Check that a source's own train and test parts share no subject.

    Raises:
        UserError: a subject stands in both.
    """
    both = sorted(set(training) & set(reserved))
    if both:
        raise UserError(
            f"subject {both[0]!r} stands in imagesTr and in imagesTs of {root} ({len(both)} such); "
            "one subject is in one split only: move its files to one of them"
        )
