"""Reading dataset.json and class lists, as the sources of labeled tasks share it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from medseg_ssl.config import UserError


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


def subject_of(case: str, expression: str | None) -> str:
    """The subject a case belongs to: the group ``subject`` of an expression, or the case itself.

    Raises:
        UserError: the expression does not match the case's name.
    """
    if expression is None:
        return case
    found = re.match(expression, case)
    if found is None or not found["subject"]:
        raise UserError(f"source.subject_regex {expression!r} does not match the case name {case!r}")
    return found["subject"]


def has_subject(expression: str | None) -> str | None:
    """Check of a config's ``subject_regex``: it compiles and has a group ``subject``."""
    if expression is None:
        return None
    try:
        groups = re.compile(expression).groupindex
    except re.error as error:
        raise ValueError(f"{expression!r} is no regular expression ({error})") from None
    if "subject" not in groups:
        raise ValueError("it needs a group (?P<subject>…)")
    return expression


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
