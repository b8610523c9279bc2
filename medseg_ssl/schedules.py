"""Schedules as pure functions of ``progress`` in [0, 1]; they have no state, so resuming needs none."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import AfterValidator


def _rising(shares: tuple[float, float]) -> tuple[float, float]:
    if not 0.0 <= shares[0] <= shares[1] <= 1.0:
        raise ValueError(f"must be two shares of the run, from 0 to 1 and rising, got {list(shares)}")
    return shares


Ramp = Annotated[tuple[float, float], AfterValidator(_rising)]
"""A config's field: the shares of a run at which something begins to rise from 0, and at which it has risen to 1."""


def _check(progress: float) -> None:
    if not 0.0 <= progress <= 1.0:
        raise ValueError(f"progress must lie in [0, 1], got {progress!r}")


def linear(progress: float, start: float, end: float) -> float:
    """A straight line from ``start`` (progress 0) to ``end`` (progress 1)."""
    _check(progress)
    return start + (end - start) * progress


def cosine(progress: float, start: float, end: float) -> float:
    """Half a cosine from ``start`` to ``end`` (SGDR, arXiv 1608.03983, one cycle)."""
    _check(progress)
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * progress))


def warmup(progress: float, fraction: float) -> float:
    """Factor that rises linearly from 0 to 1 over the first ``fraction`` of a run."""
    _check(progress)
    if fraction <= 0.0 or progress >= fraction:
        return 1.0
    return progress / fraction


def ramp(progress: float, shares: tuple[float, float]) -> float:
    """Factor that is 0 up to the first share of a run and rises linearly to 1 at the second."""
    _check(progress)
    begin, end = shares
    if progress >= end:
        return 1.0
    return max(0.0, (progress - begin) / (end - begin)) if end > begin else 0.0


def after_warmup(progress: float, fraction: float) -> float:
    """Progress of the part that follows a warm-up of ``fraction``: 0 at its end, 1 at the end of the run."""
    _check(progress)
    if progress <= fraction:
        return 0.0
    return (progress - fraction) / (1.0 - fraction)


def learning_rate(progress: float, *, kind: str, warmup_fraction: float, final: float = 0.0) -> float:
    """Factor on the peak learning rate: linear warm-up, then the named decay.

    Args:
        progress: share of the run done.
        kind: ``constant``, ``cosine``, ``linear`` or ``poly`` (power 0.9, as in nnU-Net).
        warmup_fraction: share of the run spent warming up.
        final: factor reached at the end by ``cosine`` and ``linear``.

    Raises:
        ValueError: an unknown ``kind`` or a progress outside [0, 1].
    """
    rise = warmup(progress, warmup_fraction)
    rest = after_warmup(progress, warmup_fraction)
    if rise < 1.0:
        return rise
    decays = {
        "constant": lambda: 1.0,
        "cosine": lambda: cosine(rest, 1.0, final),
        "linear": lambda: linear(rest, 1.0, final),
        "poly": lambda: (1.0 - rest) ** 0.9,
    }
    if kind not in decays:
        raise ValueError(f"no schedule named {kind!r}; known: {', '.join(sorted(decays))}")
    return decays[kind]()


def momentum(progress: float, start: float, end: float = 1.0) -> float:
    """Teacher momentum, cosine from ``start`` to ``end`` (BYOL, arXiv 2006.07733)."""
    return cosine(progress, start, end)
