"""Roots that lie elsewhere (``s3://``, ``gs://``, ``https://`` …): mirrored file by file, then prepared like any other.

fsspec does the talking, credentials come from where its file systems look for them. A mirror needs the space of the raw
scans; what is there already, of the same size and version as far as the server states them, is not fetched again, what
the server no longer has is removed, and a file appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from medseg_ssl.config import UserError

logger = logging.getLogger(__name__)

_STATE = ".versions.json"
_SAVE_EVERY = 200
_VERSIONS = ("ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "md5Hash", "created")


def is_remote(root: str | Path) -> bool:
    """Whether a root is an address."""
    return "://" in str(root)


def mirror(address: str, cache: Path, *, on_progress: Callable[[int, int], None] | None = None) -> Path:
    """Fetch every file below an address.

    Args:
        address: a folder, such as ``s3://bucket/scans``.
        cache: folder of mirrors; each address has its own below it.
        on_progress: called with (files done, files in all).

    Returns:
        The local folder with the same layout.

    Raises:
        UserError: no such file system, nothing there, no permission, or the connection or the disk failed; the same
            command goes on where it stopped.
    """
    import fsspec

    target = Path(cache) / hashlib.sha256(address.encode()).hexdigest()[:16]
    try:
        system, start = fsspec.core.url_to_fs(address)
        found: dict[str, Mapping[str, Any]] = system.find(start, detail=True)  # pyright: ignore[reportAssignmentType]
    except ImportError as error:
        raise UserError(f"cannot read {address}: {error}") from error
    except Exception as error:  # every file system raises errors of its own kind
        raise UserError(f"cannot list {address}: {_first_line(error)}") from error
    files = {name: info for name, info in sorted(found.items()) if info.get("type") != "directory"}
    if not files:
        raise UserError(f"{address} holds no files (an https address must show an index of its folder)")
    state = _read_state(target / _STATE)
    try:
        _forget(address, target, start, [name for name in state if name not in files], state)
        for number, (name, info) in enumerate(files.items()):
            _fetch(system, name, info, _place(target, name, start), state)
            if (number + 1) % _SAVE_EVERY == 0:
                _write_state(target / _STATE, state)
            if on_progress is not None:
                on_progress(number + 1, len(files))
    except OSError as error:
        raise UserError(
            f"cannot mirror {address} to {target}: {error.strerror or _first_line(error)}"
        ) from error
    finally:
        if target.is_dir():
            _write_state(target / _STATE, state)
    return target


def _fetch(system: Any, name: str, info: Mapping[str, Any], place: Path, state: dict[str, str]) -> None:
    version = json.dumps([info.get("size"), *(str(info.get(key, "")) for key in _VERSIONS)])
    if state.get(name) == version and place.is_file():
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    partial = place.with_name(f".{place.name}.part")
    try:
        system.get_file(name, str(partial))
        os.replace(partial, place)
    except OSError:
        raise
    except Exception as error:  # every file system raises errors of its own kind
        raise UserError(
            f"cannot fetch {name}: {_first_line(error)}; the same command goes on from here"
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    state[name] = version


def _forget(address: str, target: Path, start: str, gone: Sequence[str], state: dict[str, str]) -> None:
    """Remove mirrored files that the server no longer has: a scan that was withdrawn must not live on here.

    Raises:
        UserError: most of the mirror would go, as where a server shows a part of its folder.
    """
    if len(gone) > max(10, len(state) // 2):
        raise UserError(
            f"{address} no longer shows {len(gone)} of {len(state)} mirrored files; if that is meant, remove its mirror"
            f" {target}"
        )
    for name in gone:
        _place(target, name, start).unlink(missing_ok=True)
        del state[name]
    if gone:
        logger.warning("%d files are no longer at the address and were removed from its mirror", len(gone))


def _place(target: Path, name: str, start: str) -> Path:
    """Where a remote file goes; never outside the mirror, whatever a server calls it."""
    relative = PurePosixPath(name.removeprefix(start).lstrip("/") or PurePosixPath(name).name)
    if ".." in relative.parts or relative.is_absolute():
        raise UserError(f"a remote file has a path that leaves its folder: {name}")
    return target / relative


def _read_state(path: Path) -> dict[str, str]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _write_state(path: Path, state: Mapping[str, str]) -> None:
    partial = path.with_name(f"{path.name}.part")
    partial.write_text(json.dumps(state), encoding="utf-8")
    os.replace(partial, path)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200] or type(error).__name__
