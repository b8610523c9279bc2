"""Values of header elements: absent, one or many; a number or something else."""

from __future__ import annotations

from typing import Any

SIEMENS_B_VALUE = (0x0019, 0x100C)
"""Where a scanner of Siemens notes a b-value that the standard element lacks."""


def numbers(values: Any, count: int) -> tuple[float, ...] | None:
    """A multi-valued number of a header, None where it is absent or not ``count`` finite numbers."""
    try:
        found = tuple(float(v) for v in values)
    except (TypeError, ValueError):
        return None
    return found if len(found) == count and all(abs(v) < 1e9 for v in found) else None


def values(value: Any) -> list[Any]:
    """A header's value as a list: absent, one or many."""
    if value is None or value == "":
        return []
    if isinstance(value, (str, bytes)) or not hasattr(value, "__iter__"):
        return [value]
    return list(value)


def number(value: Any) -> float | str | None:
    """The first value as a number, as short text where it is none, None where it is absent."""
    found = next(iter(values(value)), None)
    if found is None or found == "":
        return None
    try:
        return float(found)
    except (TypeError, ValueError):
        return str(found)[:16]
