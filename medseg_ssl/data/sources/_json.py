"""JSON files that came with somebody's data, read as what they are: of any size and any content."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_mapping(path: Path, *, most_bytes: int) -> dict[str, Any]:
    """The mapping a JSON file holds.

    Args:
        path: the file.
        most_bytes: of the file; a larger one is not read.

    Raises:
        ValueError: it is no plain file, cannot be read, is too large, no JSON, or no mapping; the message is
            the reason, without the path.
    """
    try:
        if not path.is_file():
            raise ValueError("there is no such file (or it is a broken link)")
        size = path.stat().st_size
        if size > most_bytes:
            raise ValueError(f"it holds {size} bytes, more than the {most_bytes} that are read")
        content = json.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise ValueError(f"it cannot be read ({error.strerror or type(error).__name__})") from None
    except UnicodeDecodeError:
        raise ValueError("it is no UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is no valid JSON (line {error.lineno}: {error.msg})") from None
    except RecursionError:
        raise ValueError("it is no JSON that can be read (nested too deeply)") from None
    if not isinstance(content, dict):
        raise ValueError(f"it must hold a mapping, found {type(content).__name__}")
    return content
