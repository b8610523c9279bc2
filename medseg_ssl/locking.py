"""One process at a time in a folder."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from medseg_ssl.config import UserError


def lock(path: Path, *, folder: Path | None = None) -> int:
    """Lock a file until its descriptor is closed or the process ends, however it ends.

    Args:
        path: made where it is missing.
        folder: what the message names; None: the file's.

    Returns:
        The descriptor, for ``os.close``.

    Raises:
        UserError: another process holds it, or its file system has no locks.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise UserError(
            f"another process is working on {folder or path.parent}; wait for it, or name another folder"
        ) from error
    except OSError as error:
        os.close(descriptor)
        raise UserError(f"cannot lock {path}: {error.strerror or error}") from error
    return descriptor


@contextmanager
def locked(path: Path, *, folder: Path | None = None) -> Iterator[None]:
    """``lock`` while the context lasts."""
    descriptor = lock(path, folder=folder)
    try:
        yield
    finally:
        os.close(descriptor)
