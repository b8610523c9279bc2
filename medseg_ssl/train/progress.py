"""A progress bar with the time left in a terminal, a line now and then in a log file, nothing where asked for quiet."""

from __future__ import annotations

import sys
import time
from types import TracebackType

BAR_EVERY_S = 0.5
LINE_EVERY_S = 30.0


def clock(seconds: float) -> str:
    """``1:02:03`` or ``2:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Progress:
    """Shows how far a run is.

    It draws only when a step is told to it, never from a thread of its own, so that it costs a run nothing between.

    Args:
        description: what runs, a word or two.
        quiet: show nothing at all.
    """

    def __init__(self, description: str, *, quiet: bool = False) -> None:
        self.description = description
        self.quiet = quiet
        self._text = ""
        self._first: tuple[int, float] | None = None
        self._shown = 0.0
        self._bar = None
        if not quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
            from rich.progress import Progress as Bar

            words = TextColumn("{task.description}"), TextColumn("{task.fields[text]}")
            columns = (words[0], BarColumn(), MofNCompleteColumn(), words[1])
            self._bar = Bar(*columns, console=Console(stderr=True), auto_refresh=False)
            self._task = self._bar.add_task(description, text="", total=None)

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.refresh()
            self._bar.stop()

    def note(self, text: str) -> None:
        """Words shown beside the bar from now on, such as the loss."""
        self._text = text

    def advance(self, step: int, total: int) -> None:
        """Tell that ``step`` of ``total`` steps are done."""
        if self.quiet:
            return
        now = time.monotonic()
        if self._first is None:
            self._first = (step, now)
        if now - self._shown < (BAR_EVERY_S if self._bar is not None else LINE_EVERY_S) and step != total:
            return
        self._shown = now
        done, spent = step - self._first[0], now - self._first[1]
        left = f"{clock(spent / done * (total - step))} left" if done and step < total else clock(spent)
        text = " · ".join(t for t in (self._text, left) if t)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, total=total, text=text)
            self._bar.refresh()
        else:
            self.say(f"{self.description} {step}/{total} · {text}")

    def say(self, line: str) -> None:
        """One line on standard error, above the bar."""
        if self.quiet:
            return
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False)
        else:
            sys.stderr.write(line + "\n")
            sys.stderr.flush()
