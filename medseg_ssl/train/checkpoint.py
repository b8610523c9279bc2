"""``last.ckpt``: all that a run needs to go on as if it had never stopped, never half written."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import torch

from medseg_ssl.config import UserError

FORMAT = 1


class Checkpoint:
    """The one checkpoint of a run folder.

    Args:
        path: ``RUN/last.ckpt``.
        writes: False on all but the main process.
    """

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self.path = Path(path)
        self.writes = writes

    def load(self) -> dict[str, Any] | None:
        """The saved state on the CPU, or None where there is none.

        Raises:
            UserError: the file cannot be read as a checkpoint of this version.
        """
        if not self.path.is_file():
            return None
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises a dozen kinds for a broken file
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            message = f"cannot read the checkpoint {self.path}: {reason}; remove it to start the run anew"
            raise UserError(message) from error
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            found = state.get("format") if isinstance(state, dict) else type(state).__name__
            raise UserError(f"{self.path} has checkpoint format {found!r}, this version reads {FORMAT}")
        return state

    def save(self, state: dict[str, Any]) -> None:
        """Write the state beside the old file, then put it in its place in one move.

        Raises:
            UserError: the disk is full or not writable; the old checkpoint is intact and nothing else is left behind.
        """
        if self.writes:
            replace_file(self.path, lambda stream: torch.save({"format": FORMAT, **state}, stream))


def replace_file(path: Path, write: Any) -> None:
    """Fill ``path`` through ``write(stream)`` atomically: temporary file, fsync, move.

    Raises:
        UserError: the disk is full or not writable; an older file is intact and the temporary one is removed.
    """
    temporary = path.with_name(path.name + ".tmp")
    watched: _Watched | None = None
    try:
        with open(temporary, "wb") as stream:
            watched = _Watched(stream)
            write(watched)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        # torch's zip writer turns the file's error into a RuntimeError of its own
        cause = watched.error if watched is not None and watched.error is not None else error
        if isinstance(cause, OSError):
            raise UserError(_failure(path, cause)) from error
        raise


def _failure(path: Path, error: OSError) -> str:
    kept = "; the one written before is intact" if path.exists() else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left on the disk for {path}{kept}: free some space and run the same command again"
    return f"cannot write {path}: {error.strerror or error}{kept}"


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _Watched:
    """A stream that remembers the first error of the file below it."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self._stream.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self.error = self.error or error
            raise
