"""Intervals and tests for scores of many test cases under a few training draws.

A table ``scores_ND`` has one row per test case and one column per draw (a drawn training subset and its
seed). Cases and draws are crossed random effects: a hard case is hard for every draw, a lucky draw is good on
every case, so the cells are not independent and neither "all cells" nor "cases only" gives an honest
interval. Where an encoder was pretrained several times, ``scores_NDP`` has the pretrainings as third axis,
crossed with both: each draw is fine-tuned from each pretraining. Suffix letters here: N test cases, D draws,
P pretrainings. NaN is a missing score.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import NamedTuple

import numpy as np

AXES = ("cases", "draws", "pretrainings")
EXACT = 1e-12
"""Scores differ by more than this or not at all: below lies the rounding of means."""


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval.

    Attributes:
        mean: least-squares mean over cases, draws and pretrainings; NaN without any score.
        low: lower end; NaN where no interval can be given (a single score).
        high: upper end.
        p: two-sided p-value of "the mean is 0", from the same standard error; NaN as ``low``.
        standard_error: of the mean.
        freedom: Satterthwaite degrees of freedom.
        cases: rows that hold a score.
        draws: columns that hold a score.
        covers: what the interval generalises over, of ``cases, draws and pretrainings`` those of which there are
            several, or ``nothing``.
        pretrainings: layers that hold a score.
    """

    mean: float
    low: float
    high: float
    p: float
    standard_error: float
    freedom: float
    cases: int
    draws: int
    covers: str
    pretrainings: int = 1

    @property
    def excludes_zero(self) -> bool:
        """True where the whole interval lies on one side of 0."""
        return bool(self.low > 0 or self.high < 0)


@dataclass(frozen=True)
class PairedTests:
    """Tests of two inits on case means over draws: draws are held fixed, cases are the sample.

    Attributes:
        cases: cases scored under both.
        t_p: two-sided paired t-test.
        wilcoxon_p: two-sided Wilcoxon signed-rank test.
    """

    cases: int
    t_p: float
    wilcoxon_p: float


class _Square(NamedTuple):
    """A mean square of the layout, with the weight it has in the variance of the mean."""

    size: float
    freedom: float
    weight: float = 1.0


def crossed_interval(scores_NDP: np.ndarray, *, level: float = 0.95) -> Interval:
    """Interval for the mean of a table whose cases, draws and pretrainings are crossed random effects.

    With one pretraining, the variance of the mean, σ²_case/N + σ²_draw/D + σ²_rest/(N·D), is estimated from the mean
    squares of the two-way layout, (MS_case + MS_draw − MS_rest)/(N·D), with degrees of freedom after Satterthwaite
    (1946, Biometrics Bulletin 2(6)). A component estimated below zero is taken as zero and its mean square joins the
    rest, as in "sometimes pooling". A percentile bootstrap over 3 draws covers far too little (see the simulations in
    the tests); this covers between 92 and 98 % with 3 or more draws and 12 or more cases, whatever the components, and
    86 to 98 % with 2 draws or 2 cases.

    With several pretrainings, draws × pretrainings are the two-way layout of the fits, whose rest is what one
    fine-tuning differs from another; the cases add MS_case less what their interactions with draws and pretrainings
    put into it (Cornfield & Tukey 1956, doi:10.1214/aoms/1177728067, give the expected mean squares). With 3 or more
    of each the coverage lies between 92 and 98 % (99 % where there is nothing but the rest), with 2 of one between 87
    and 98 %.

    Missing cells are filled by least squares and cost a degree of freedom each (Yates 1933).

    Args:
        scores_NDP: scores (cases, draws) or (cases, draws, pretrainings), NaN = missing; cases, draws or
            pretrainings without any score are left out.
        level: confidence level.

    Raises:
        ValueError: not a table, or a level outside (0, 1).
    """
    scores_NDP = np.asarray(scores_NDP, dtype=np.float64)
    if scores_NDP.ndim not in (2, 3):
        raise ValueError(
            "expected a table (cases, draws) or (cases, draws, pretrainings), got"
            f" {scores_NDP.ndim} dimensions"
        )
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    table_NDP, missing = complete(scores_NDP if scores_NDP.ndim == 3 else scores_NDP[..., None])
    if table_NDP.size == 0:
        return Interval(np.nan, np.nan, np.nan, np.nan, np.nan, 0.0, 0, 0, "nothing", 0)
    cases, draws, pretrainings = table_NDP.shape
    mean = float(table_NDP.mean())
    several = [axis for axis, count in zip(AXES, table_NDP.shape, strict=True) if count > 1]
    if not several:
        return Interval(mean, np.nan, np.nan, np.nan, np.nan, 0.0, 1, 1, "nothing")
    variance, freedom = _variance_of_mean(table_NDP.squeeze(), missing)
    error = float(np.sqrt(variance))
    half, p = _student(mean, error, freedom, level)
    covers = " and ".join(filter(None, [", ".join(several[:-1]), several[-1]]))
    return Interval(mean, mean - half, mean + half, p, error, freedom, cases, draws, covers, pretrainings)


def paired_interval(scores_NDP: np.ndarray, baseline_NDP: np.ndarray, *, level: float = 0.95) -> Interval:
    """Interval for the mean difference of two inits on the same cases, draws and pretrainings.

    A cell enters where both have a score. Where one of the two has a single pretraining, or none as scratch, it
    stands beside every pretraining of the other.

    Raises:
        ValueError: tables of different shape.
    """
    return crossed_interval(_paired(scores_NDP, baseline_NDP), level=level)


def detectable_difference(
    standard_error: float, freedom: float, *, power: float = 0.8, level: float = 0.95
) -> float:
    """The smallest true difference that a two-sided test would find with the given power.

    The difference δ at which a noncentral t with ``freedom`` degrees and noncentrality δ/``standard_error`` lies beyond
    the critical value, on the side of δ, with probability ``power``. It follows from the noise alone, not from the
    difference that was seen, so it says what the design could have found (no "observed power"). It is only as certain
    as the standard error: with 2 degrees of freedom, roughly.

    Args:
        standard_error: of the mean difference.
        freedom: degrees of freedom of the standard error.
        power: probability of finding it, above 1 − ``level``.
        level: 1 − significance level.

    Returns:
        The difference, in the unit of the standard error; NaN without a standard error.

    Raises:
        ValueError: level outside (0, 1), or a power outside (1 − level, 1).
    """
    from scipy.special import nctdtrinc, stdtrit

    if not 0 < 1 - level < power < 1:
        raise ValueError(f"level and power must lie in (0, 1), power above 1 − level, got {level}, {power}")
    if np.isnan(standard_error):
        return float("nan")
    edge = float(stdtrit(freedom, 0.5 + level / 2))
    return float(nctdtrinc(freedom, 1 - power, edge)) * standard_error


def paired_tests(scores_NDP: np.ndarray, baseline_NDP: np.ndarray) -> PairedTests:
    """Paired t-test and Wilcoxon signed-rank test on case means over draws and pretrainings.

    Both ask about new cases under *these* draws; ``paired_interval`` asks about new cases and new draws.

    Raises:
        ValueError: tables of different shape.
    """
    from scipy import stats

    difference_NDP, _ = complete(_paired(scores_NDP, baseline_NDP))
    difference_N = difference_NDP.mean(axis=(1, 2)) if difference_NDP.size else np.empty(0)
    # ranks must not see the rounding of means: it would break ties and make differences out of none
    difference_N = np.where(np.abs(difference_N) <= EXACT, 0.0, difference_N.round(12))
    if len(difference_N) < 2:
        return PairedTests(len(difference_N), float("nan"), float("nan"))
    if np.all(difference_N == 0):
        return PairedTests(len(difference_N), 1.0, 1.0)
    error = float(difference_N.std(ddof=1) / np.sqrt(len(difference_N)))
    _, t_p = _student(float(difference_N.mean()), error, len(difference_N) - 1.0, 0.95)
    wilcoxon = stats.wilcoxon(difference_N, zero_method="wilcox")
    wilcoxon_p = float(wilcoxon.pvalue)  # pyright: ignore[reportAttributeAccessIssue]
    return PairedTests(len(difference_N), t_p, wilcoxon_p)


def independent_difference(first: Interval, second: Interval, *, level: float = 0.95) -> Interval:
    """Interval for the difference of two means that share neither cases nor draws (Welch 1947, Satterthwaite 1946)."""
    from scipy.special import stdtr, stdtrit

    error = math.hypot(first.standard_error, second.standard_error)
    mean = first.mean - second.mean
    covers = first.covers if first.covers == second.covers else "nothing"
    counts = {
        name: min(getattr(first, name), getattr(second, name)) for name in ("cases", "draws", "pretrainings")
    }
    if math.isnan(error) or error == 0.0:
        return replace(first, mean=mean, low=math.nan, high=math.nan, p=math.nan, standard_error=error, freedom=0.0,
                       covers="nothing", **counts)  # fmt: skip
    spread = first.standard_error**4 / first.freedom + second.standard_error**4 / second.freedom
    freedom = error**4 / spread
    half = float(stdtrit(freedom, 0.5 + level / 2)) * error
    p = float(2 * stdtr(freedom, -abs(mean) / error))
    return replace(first, mean=mean, low=mean - half, high=mean + half, p=p, standard_error=error, freedom=freedom,
                   covers=covers, **counts)  # fmt: skip


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment for several tests; NaN (no test) stays NaN and is not counted."""
    p = np.asarray(p_values, dtype=np.float64)
    tested = np.flatnonzero(~np.isnan(p))
    adjusted = np.full(p.shape, np.nan)
    running = 0.0
    for rank, index in enumerate(tested[np.argsort(p[tested], kind="stable")]):
        running = max(running, min(1.0, (len(tested) - rank) * p[index]))
        adjusted[index] = running
    return adjusted.tolist()


def complete(scores: np.ndarray) -> tuple[np.ndarray, int]:
    """Drop empty slices of every axis and fill the remaining gaps with the least-squares fit of all effects but the
    highest.

    The fit is additive in cases and draws where there is one pretraining. Where there are several, it holds all
    interactions of two, so the draws or pretrainings that lack a whole fit are dropped first, then the cases that lack
    every score under a draw or under a pretraining.

    Args:
        scores: (cases, draws) or (cases, draws, pretrainings), NaN = missing.

    Returns:
        The table without gaps, with as many axes, and the number of cells that were filled. Cases with gaps are
        dropped instead where the fill would leave no degree of freedom for the rest.
    """
    table = scores
    for axis in range(table.ndim):
        others = tuple(other for other in range(table.ndim) if other != axis)
        table = table.compress(~np.isnan(scores).all(axis=others), axis=axis)
    if table.ndim == 3 and min(table.shape[1:], default=0) > 1:
        table = _whole_fits(table)
    present = ~np.isnan(table)
    missing = int((~present).sum())
    if missing == 0:
        return table, 0
    if np.prod([count - 1 for count in table.shape if count > 1]) - missing < 1:
        full = present.reshape(len(present), -1).all(axis=1)
        return table[full], 0
    filled = np.where(present, table, np.nanmean(table))
    # the fill leaves no rest in the gaps: solved at once, since the rest of a layout is a product of centrings
    gaps = [
        (index, count) for index, count in zip(np.nonzero(~present), table.shape, strict=True) if count > 1
    ]
    share_MM = np.prod([(index[:, None] == index) - 1 / count for index, count in gaps], axis=0)
    rest_M = _effects(filled.squeeze())[-1][1].reshape(filled.shape)[~present]
    filled[~present] -= np.linalg.lstsq(share_MM, rest_M, rcond=None)[0]
    return filled, missing


def _whole_fits(table_NDP: np.ndarray) -> np.ndarray:
    """The part in which every draw was fine-tuned from every pretraining and every case has a score under each."""
    fits_DP = ~np.isnan(table_NDP).all(axis=0)
    while not fits_DP.all():
        lacking = [(~fits_DP).mean(axis=1), (~fits_DP).mean(axis=0)]
        axis = int(lacking[1].max() > lacking[0].max())
        worst = int(lacking[axis].argmax())
        fits_DP, table_NDP = np.delete(fits_DP, worst, axis), np.delete(table_NDP, worst, axis + 1)
    present_NDP = ~np.isnan(table_NDP)
    scored_NP, scored_ND = present_NDP.any(axis=1), present_NDP.any(axis=2)
    return table_NDP[np.hstack([scored_NP, scored_ND]).all(axis=-1)]


def _paired(scores_NDP: np.ndarray, baseline_NDP: np.ndarray) -> np.ndarray:
    """Differences of two tables, always with an axis of pretrainings."""
    both = [np.asarray(table, dtype=np.float64) for table in (scores_NDP, baseline_NDP)]
    first, second = (table[..., None] if table.ndim == 2 else table for table in both)
    if first.shape[:2] != second.shape[:2] or (
        first.shape != second.shape and 1 not in (first.shape[-1], second.shape[-1])
    ):
        raise ValueError(f"paired tables must have one shape, got {both[0].shape} and {both[1].shape}")
    return first - second


def _effects(table: np.ndarray) -> list[tuple[tuple[int, ...], np.ndarray]]:
    """Axes and values of every effect of a complete layout, main effects first, the rest last."""
    found: list[tuple[tuple[int, ...], np.ndarray]] = []
    axes, grand = range(table.ndim), table.mean()
    for order in range(1, table.ndim + 1):
        for own in combinations(axes, order):
            mean = table.mean(axis=tuple(a for a in axes if a not in own), keepdims=True)
            effect = mean - grand
            for lower, value in found:
                if set(lower) < set(own):
                    effect = effect - value
            found.append((own, effect))
    return found


def _variance_of_mean(table: np.ndarray, missing: int) -> tuple[float, float]:
    """Variance of the mean and its degrees of freedom; every axis must be longer than one."""
    squares: list[_Square] = []
    for own, effect in _effects(table):
        freedom = float(np.prod([table.shape[axis] - 1.0 for axis in own]))
        freedom -= missing if len(own) == table.ndim else 0
        squares.append(_Square(table.size // effect.size * float((effect**2).sum()) / freedom, freedom))
    if table.ndim == 1:
        terms = squares
    elif table.ndim == 2:
        terms = _two_way(*squares)
    else:
        case, draw, pretraining, case_draw, case_pretraining, fit, rest = squares
        terms = _two_way(draw, pretraining, fit)
        shared = _sum_of_interactions([case_draw, case_pretraining], rest)
        if case.size > sum(s.weight * s.size for s in shared):
            terms += [case, *(s._replace(weight=-s.weight) for s in shared)]
    if len(terms) == 1:
        return terms[0].size / table.size, terms[0].freedom
    combined = sum(s.weight * s.size for s in terms)
    spread = sum((s.weight * s.size) ** 2 / s.freedom for s in terms)
    floor = min(s.freedom for s in terms if s.weight > 0)
    return combined / table.size, max(combined**2 / spread, floor)


def _two_way(first: _Square, second: _Square, rest: _Square) -> list[_Square]:
    """Mean squares that make up the variance of the mean of two crossed effects."""
    real = [square for square in (first, second) if square.size > rest.size]
    if len(real) == 2:
        return [first, second, rest._replace(weight=-1.0)]
    return real or [_pool([first, second, rest])]


def _sum_of_interactions(interactions: Sequence[_Square], rest: _Square) -> list[_Square]:
    """Mean squares that make up what a main effect's mean square holds without the main effect itself."""
    real = [square for square in interactions if square.size > rest.size]
    pooled = _pool([*(square for square in interactions if square.size <= rest.size), rest])
    return [*real, pooled._replace(weight=1.0 - len(real))]


def _pool(squares: Sequence[_Square]) -> _Square:
    freedom = sum(square.freedom for square in squares)
    return _Square(sum(square.size * square.freedom for square in squares) / freedom, freedom)


def _student(mean: float, error: float, freedom: float, level: float) -> tuple[float, float]:
    """Half width of the interval and two-sided p-value against 0."""
    from scipy.special import stdtr, stdtrit

    half = float(stdtrit(freedom, 0.5 + level / 2)) * error
    # equal scores leave rounding noise of about 1e-17 in the error, which must not pass for evidence
    if error <= EXACT:
        return half, 1.0 if abs(mean) <= EXACT else 0.0
    return half, float(2 * stdtr(freedom, -abs(mean) / error))
