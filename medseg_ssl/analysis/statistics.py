"""Intervals and tests for scores of many test cases under a few training draws.

A table ``scores_ND`` has one row per test case and one column per draw (a drawn training subset and its
seed). Cases and draws are crossed random effects: a hard case is hard for every draw, a lucky draw is good on
every case, so the cells are not independent and neither "all cells" nor "cases only" gives an honest
interval. Suffix letters here: N test cases, D draws. NaN is a missing score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval.

    Attributes:
        mean: least-squares mean over cases and draws; NaN without any score.
        low: lower end; NaN where no interval can be given (a single score).
        high: upper end.
        p: two-sided p-value of "the mean is 0", from the same standard error; NaN as ``low``.
        standard_error: of the mean.
        freedom: Satterthwaite degrees of freedom.
        cases: rows that hold a score.
        draws: columns that hold a score.
        covers: what the interval generalises over: ``cases and draws``, ``cases`` (one draw), ``draws`` (one
            case) or ``nothing``.
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


def crossed_interval(scores_ND: np.ndarray, *, level: float = 0.95) -> Interval:
    """Interval for the mean of a table whose cases and draws are crossed random effects.

    The variance of the mean, σ²_case/N + σ²_draw/D + σ²_rest/(N·D), is estimated from the mean squares of the
    two-way layout, (MS_case + MS_draw − MS_rest)/(N·D), with degrees of freedom after Satterthwaite (1946,
    Biometrics Bulletin 2(6)). A component estimated below zero is taken as zero and its mean square joins the
    rest, as in "sometimes pooling". With 3 to 5 draws this covers what it says (see the simulation in the
    tests), where a percentile bootstrap over draws covers far too little. Missing cells are filled by least
    squares and cost a degree of freedom each (Yates 1933).

    Args:
        scores_ND: scores, NaN = missing; cases or draws without any score are left out.
        level: confidence level.

    Raises:
        ValueError: not a table, or a level outside (0, 1).
    """
    scores_ND = np.asarray(scores_ND, dtype=np.float64)
    if scores_ND.ndim != 2:
        raise ValueError(f"expected a table (cases, draws), got {scores_ND.ndim} dimensions")
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    table_ND, missing = complete(scores_ND)
    cases, draws = table_ND.shape
    if table_ND.size == 0:
        return Interval(np.nan, np.nan, np.nan, np.nan, np.nan, 0.0, 0, 0, "nothing")
    mean = float(table_ND.mean())
    if min(cases, draws) > 1:
        variance, freedom = _crossed_variance(table_ND, missing)
        covers = "cases and draws"
    elif table_ND.size > 1:
        variance, freedom = float(table_ND.var(ddof=1)) / table_ND.size, float(table_ND.size - 1)
        covers = "cases" if draws == 1 else "draws"
    else:
        return Interval(mean, np.nan, np.nan, np.nan, np.nan, 0.0, 1, 1, "nothing")
    error = float(np.sqrt(variance))
    half, p = _student(mean, error, freedom, level)
    return Interval(mean, mean - half, mean + half, p, error, freedom, cases, draws, covers)


def paired_interval(scores_ND: np.ndarray, baseline_ND: np.ndarray, *, level: float = 0.95) -> Interval:
    """Interval for the mean difference of two inits on the same cases (rows) and draws (columns).

    A cell enters where both have a score.

    Raises:
        ValueError: tables of different shape.
    """
    scores_ND, baseline_ND = (
        np.asarray(scores_ND, dtype=np.float64),
        np.asarray(baseline_ND, dtype=np.float64),
    )
    if scores_ND.shape != baseline_ND.shape:
        raise ValueError(f"paired tables must have one shape, got {scores_ND.shape} and {baseline_ND.shape}")
    return crossed_interval(scores_ND - baseline_ND, level=level)


def paired_tests(scores_ND: np.ndarray, baseline_ND: np.ndarray) -> PairedTests:
    """Paired t-test and Wilcoxon signed-rank test on case means over draws.

    Both ask about new cases under *these* draws; ``paired_interval`` asks about new cases and new draws.

    Raises:
        ValueError: tables of different shape.
    """
    from scipy import stats

    scores_ND, baseline_ND = (
        np.asarray(scores_ND, dtype=np.float64),
        np.asarray(baseline_ND, dtype=np.float64),
    )
    if scores_ND.shape != baseline_ND.shape:
        raise ValueError(f"paired tables must have one shape, got {scores_ND.shape} and {baseline_ND.shape}")
    difference_ND, _ = complete(scores_ND - baseline_ND)
    difference_N = difference_ND.mean(axis=1) if difference_ND.size else np.empty(0)
    if len(difference_N) < 2:
        return PairedTests(len(difference_N), float("nan"), float("nan"))
    if np.all(difference_N == 0):
        return PairedTests(len(difference_N), 1.0, 1.0)
    error = float(difference_N.std(ddof=1) / np.sqrt(len(difference_N)))
    _, t_p = _student(float(difference_N.mean()), error, len(difference_N) - 1.0, 0.95)
    wilcoxon = stats.wilcoxon(difference_N, zero_method="wilcox")
    wilcoxon_p = float(wilcoxon.pvalue)  # pyright: ignore[reportAttributeAccessIssue]
    return PairedTests(len(difference_N), t_p, wilcoxon_p)


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


def complete(scores_ND: np.ndarray) -> tuple[np.ndarray, int]:
    """Drop empty rows and columns and fill the remaining gaps with the additive least-squares fit.

    Returns:
        The table without gaps and the number of cells that were filled. Rows with gaps are dropped instead
        where the fill would leave no degree of freedom for the rest.
    """
    present_ND = ~np.isnan(scores_ND)
    rows, columns = present_ND.any(axis=1), present_ND.any(axis=0)
    scores_ND, present_ND = scores_ND[rows][:, columns], present_ND[rows][:, columns]
    missing = int((~present_ND).sum())
    if missing == 0:
        return scores_ND, 0
    cases, draws = scores_ND.shape
    if (cases - 1) * (draws - 1) - missing < 1:
        full = present_ND.all(axis=1)
        return (scores_ND[full], 0) if full.any() else (scores_ND[:0], 0)
    table_ND = np.where(present_ND, scores_ND, np.nanmean(scores_ND))
    # the additive fit of the filled table is the least-squares fit of the present cells at the fixed point
    for _ in range(1000):
        fit_ND = table_ND.mean(axis=1, keepdims=True) + table_ND.mean(axis=0, keepdims=True) - table_ND.mean()
        change = np.abs(fit_ND - table_ND)[~present_ND].max()
        table_ND[~present_ND] = fit_ND[~present_ND]
        if change < 1e-9:
            break
    return table_ND, missing


def _crossed_variance(table_ND: np.ndarray, missing: int) -> tuple[float, float]:
    """Variance of the mean and its degrees of freedom; needs at least two rows and two columns."""
    cases, draws = table_ND.shape
    case_effect_N = table_ND.mean(axis=1) - table_ND.mean()
    draw_effect_D = table_ND.mean(axis=0) - table_ND.mean()
    rest_ND = table_ND - table_ND.mean() - case_effect_N[:, None] - draw_effect_D[None]
    case_df, draw_df, rest_df = cases - 1.0, draws - 1.0, (cases - 1.0) * (draws - 1.0) - missing
    case_ms = draws * float((case_effect_N**2).sum()) / case_df
    draw_ms = cases * float((draw_effect_D**2).sum()) / draw_df
    rest_ms = float((rest_ND**2).sum()) / rest_df
    parts = [(case_ms, case_df), (draw_ms, draw_df)]
    real = [(ms, df) for ms, df in parts if ms > rest_ms]
    if len(real) == 2:
        combined = case_ms + draw_ms - rest_ms
        spread = case_ms**2 / case_df + draw_ms**2 / draw_df + rest_ms**2 / rest_df
        freedom = combined**2 / spread
    elif len(real) == 1:
        combined, freedom = real[0]
    else:
        freedom = case_df + draw_df + rest_df
        combined = (case_ms * case_df + draw_ms * draw_df + rest_ms * rest_df) / freedom
    return combined / (cases * draws), max(freedom, min(case_df, draw_df))


def _student(mean: float, error: float, freedom: float, level: float) -> tuple[float, float]:
    """Half width of the interval and two-sided p-value against 0."""
    from scipy.special import stdtr, stdtrit

    half = float(stdtrit(freedom, 0.5 + level / 2)) * error
    # equal scores leave rounding noise of about 1e-17 in the error, which must not pass for evidence
    if error <= 1e-12:
        return half, 1.0 if abs(mean) <= 1e-12 else 0.0
    return half, float(2 * stdtr(freedom, -abs(mean) / error))
