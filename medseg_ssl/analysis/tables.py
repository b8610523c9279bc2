"""Result folders of the measuring commands: tables and summaries written whole, and never over another
result.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from medseg_ssl.config import ConfigError, UserError

IDENTITY = "identity.json"
"""What a result folder belongs to; written first, so that an interrupted command finds its own folder again.
"""


def write_bytes(path: Path, content: bytes) -> Path:
    """Write a file whole or not at all.

    Raises:
        UserError: it cannot be written; an older file is intact.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary.exists():
            temporary.unlink()
    return path


def write_text(path: Path, text: str) -> Path:
    """Write a text whole or not at all; see ``write_bytes``."""
    return write_bytes(path, text.encode())


def write_json(path: Path, tree: Mapping[str, Any]) -> Path:
    """Write a summary."""
    return write_text(path, json.dumps(tree, indent=2) + "\n")


def format_number(value: Any) -> str:
    """A cell of a CSV file: six significant digits, empty for NaN and None."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def as_written(value: Any) -> Any:
    """A value as a table gives it back: numbers with six significant digits."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def write_csv(path: Path, rows: Iterable[Mapping[str, Any]], *, columns: Sequence[str]) -> Path:
    """Write a table: None as an empty cell, numbers with six significant digits."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([format_number(row.get(column)) for column in columns] for row in rows)
    return write_text(path, stream.getvalue())


def claim(out: Path, identity: Mapping[str, Any], *, complete: str | None = None) -> bool:
    """Take a folder for the results that ``identity`` names.

    Args:
        out: the folder; made where it is missing.
        identity: what decides the results (JSON values).
        complete: the file whose presence says that the results are all there; None where each result says so itself.

    Returns:
        True where the folder already holds these results, complete.

    Raises:
        ConfigError: it holds something else; the difference is named.
    """
    wanted = json.loads(json.dumps(identity))
    file = out / IDENTITY
    if file.is_file():
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{file} is not readable; choose another folder") from error
        if found != wanted:
            keys = sorted(k for k in {*found, *wanted} if found.get(k) != wanted.get(k))
            raise ConfigError(
                f"{out} holds other results (they differ in {', '.join(keys)}:"
                f" {'; '.join(f'{k} {found.get(k)!r} there, {wanted.get(k)!r} here' for k in keys)});"
                " choose another folder"
            )
        return complete is not None and (out / complete).is_file()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and holds something else; choose a new or empty folder")
    write_json(file, wanted)
    return False
