"""What the commands that put fits side by side share: flags, NAME=PATH arguments, and the last lines they print."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from medseg_ssl.commandline import Parser
from medseg_ssl.config import ConfigError
from medseg_ssl.fanout import ENGINES

YAML = (".yaml", ".yml")


def add_flags(parser: Parser) -> None:
    """Add ``--workers``, ``--engine``, ``--keep``, ``--quiet`` and ``--report-only``."""
    parser.add_argument("--workers", type=int, help="fits side by side (default: by cores, or one per GPU)")
    parser.add_argument("--engine", choices=ENGINES, default="local", help="default: %(default)s")
    parser.add_argument("--keep", action="store_true", help="keep the weights of every fit")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    parser.add_argument(
        "--report-only", action="store_true", help="write the tables of the fits that are done; needs OUT"
    )


def check_workers(workers: int | None) -> None:
    """Refuse a number of workers that nobody could have meant.

    Raises:
        ConfigError: below 1.
    """
    if workers is not None and workers < 1:
        raise ConfigError(f"--workers must be at least 1, got {workers}")


def read_named(flag: str, given: Sequence[str], *, what: str = "PATH") -> dict[str, Path]:
    """``NAME=PATH`` arguments by name.

    Raises:
        ConfigError: one without a name or a path, or a name given twice.
    """
    found: dict[str, Path] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals or not name or not path:
            raise ConfigError(f"cannot read --{flag} {text!r}; write NAME={what}")
        if name in found:
            raise ConfigError(f"--{flag} {name}=… is given twice")
        found[name] = Path(path)
    return found


def check_names(
    flag: str, wanted: Iterable[str], given: Mapping[str, Path], *, what: str = "PATH"
) -> dict[str, Path]:
    """The path of every wanted name; ``what`` as in ``read_named``.

    Raises:
        ConfigError: a name without a path, or a path for a name that the config does not have.
    """
    wanted = list(wanted)
    missing = [name for name in wanted if name not in given]
    if missing:
        raise ConfigError(
            "; ".join(f"{flag} {name!r} needs its path: --{flag} {name}={what}" for name in missing)
        )
    check_known(flag, wanted, given)
    return {name: Path(given[name]) for name in wanted}


def check_known(flag: str, wanted: Iterable[str], given: Mapping[str, Path]) -> dict[str, Path]:
    """The paths that are given, each of a name that the config has.

    Raises:
        ConfigError: a path for a name that it does not have.
    """
    wanted = list(wanted)
    unknown = [name for name in given if name not in wanted]
    if unknown:
        raise ConfigError(
            f"{', '.join(f'--{flag} {name}=…' for name in unknown)} {'is' if len(unknown) == 1 else 'are'} not in the"
            f" config; known: {', '.join(wanted) or 'none'}"
        )
    return {name: Path(path) for name, path in given.items()}


def without_paths(assignments: Sequence[str]) -> list[str]:
    """Overrides for a command that is shown to others: of a path that they name, only what the file is called.

    A config keeps its name, as that of the command itself does; anything else that is there reads ``PATH``.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list):
            return [plain(item) for item in value]
        if not isinstance(value, str) or not ("/" in value or os.sep in value):
            return value
        path = Path(value)
        return path.stem if path.suffix in YAML else "PATH" if path.is_absolute() or path.exists() else value

    shown = []
    for text in assignments:
        key, _, raw = text.partition("=")
        value = yaml.safe_load(raw)
        kept = plain(value)
        flat = yaml.safe_dump(kept, default_flow_style=True, sort_keys=False, width=10_000)
        shown.append(text if kept == value else f"{key}={flat.removesuffix('...' + chr(10)).strip()}")
    return shown


def show(report: Path) -> None:
    """The verdicts beside a report, how much of it is done, and where it lies."""
    from rich.console import Console

    summary = json.loads((report.parent / "summary.json").read_text(encoding="utf-8"))
    console = Console(stderr=True)
    for line in summary["verdicts"]:
        console.print(line, markup=False, highlight=False)
    if summary["finished"] < summary["planned"]:
        console.print(
            f"{summary['finished']} of {summary['planned']} fits are done", markup=False, highlight=False
        )
    console.print(f"report: {report}", markup=False, highlight=False)
