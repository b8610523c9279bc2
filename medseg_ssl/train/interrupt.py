"""SIGTERM and SIGINT as a request to save and leave."""

from __future__ import annotations

import multiprocessing
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from medseg_ssl.cli import ONE_REQUEST_S
from medseg_ssl.config import UserError


class Interrupted(UserError):  # noqa: N818 - it was asked for, nothing went wrong
    """A run was stopped from outside and has saved its state; ``code`` is 130 for SIGINT, 143 for SIGTERM."""

    def __init__(self, number: int, message: str = "") -> None:
        self.number = number
        self.code = 128 + number
        super().__init__(message or f"stopped by {signal.Signals(number).name}")

    def __reduce__(self) -> tuple[type[Interrupted], tuple[int, str]]:
        """Pickled with both arguments, for a run in a worker process."""
        return Interrupted, (self.number, str(self))

    def after(self, step: int, *, of: int, checkpoint: Path) -> Interrupted:
        """The same with the message the user sees once all is saved."""
        name = signal.Signals(self.number).name
        how = "run the same command again to continue"
        return Interrupted(
            self.number, f"stopped by {name} after step {step} of {of}, saved in {checkpoint}; {how}"
        )


class StopRequest:
    """While entered, SIGTERM and SIGINT set ``requested``; inside ``interruptible()`` they raise ``Interrupted``.

    A second signal raises ``KeyboardInterrupt`` at once, but for a SIGTERM that is sent twice. Outside the main
    thread nothing is installed.
    """

    def __init__(self) -> None:
        self._number = 0
        self._at = 0.0
        self._raises = False
        self._before: dict[int, object] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal came to this process."""
        return self._number != 0

    def interruption(self) -> Interrupted:
        """What to raise when a stop was asked for, here or in another process."""
        return Interrupted(self._number or signal.SIGTERM)

    def __enter__(self) -> StopRequest:
        in_worker = multiprocessing.parent_process() is not None
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                # Ctrl-C reaches a comparison's workers too, which ignore it: their parent ends them by SIGTERM, and a
                # handler for both would take that for the impatient second signal and lose the step it should save
                if in_worker and signal.getsignal(number) is signal.SIG_IGN:
                    continue
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    @contextmanager
    def interruptible(self, wanted: bool = True) -> Iterator[None]:
        """A stretch of waiting in which a signal raises at once, since nothing there is half done."""
        if not wanted:
            yield
            return
        try:
            self._raises = True
            if self.requested:
                raise self.interruption()
            yield
        except Interrupted:
            raise
        except (RuntimeError, UserError):
            # a signal to the whole process group also ends the loader's workers, which is reported as an error that
            # may overtake our own signal
            if not self._comes_soon():
                raise
            raise self.interruption() from None
        finally:
            self._raises = False

    def _comes_soon(self) -> bool:
        self._raises = False
        if not self.requested:
            threading.Event().wait(0.5)
        return self.requested

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.requested:
            # ``timeout`` and batch systems often send it twice, and a state is being saved for the first
            if number == signal.SIGTERM == self._number and now - self._at < ONE_REQUEST_S:
                return
            raise KeyboardInterrupt
        self._number, self._at = number, now
        if self._raises:
            raise Interrupted(number)
