"""Intervals for crossed random effects cover what they say; tests agree with known answers."""

import numpy as np
import pytest

from medseg_ssl.analysis.statistics import complete, crossed_interval, holm, paired_interval, paired_tests

MIXES = {
    "balanced": (1.0, 1.0, 1.0),
    "cases": (2.0, 0.3, 0.5),
    "cases only": (1.0, 0.0, 0.5),
    "draws": (0.2, 1.0, 0.5),
    "rest": (0.3, 0.3, 1.0),
}


def simulate(rng, cases, draws, mix):
    case, draw, rest = mix
    return (
        case * rng.standard_normal((cases, 1))
        + draw * rng.standard_normal((1, draws))
        + rest * rng.standard_normal((cases, draws))
    )


def coverage(cases, draws, mix, *, missing=0.0, runs=500, seed=0):
    rng = np.random.default_rng(seed)
    covered = 0
    for _ in range(runs):
        table = simulate(rng, cases, draws, mix)
        table[rng.random(table.shape) < missing] = np.nan
        interval = crossed_interval(table)
        covered += interval.low <= 0 <= interval.high
    return covered / runs


@pytest.mark.parametrize("draws", [3, 5, 10])
@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES.keys())
def test_95_percent_interval_covers_the_mean(mix, draws):
    assert 0.92 <= coverage(40, draws, mix, seed=draws) <= 0.98


def test_coverage_with_few_cases_and_missing_scores():
    assert 0.92 <= coverage(12, 5, MIXES["balanced"]) <= 0.98
    assert 0.92 <= coverage(40, 5, MIXES["balanced"], missing=0.1) <= 0.98
    assert 0.92 <= coverage(40, 5, MIXES["rest"], missing=0.1) <= 0.98


def test_paired_interval_covers_a_difference_with_shared_effects():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(500):
        shared = simulate(rng, 40, 5, (3.0, 1.0, 0.0))
        better = shared + 0.5 + simulate(rng, 40, 5, (0.3, 0.4, 0.5))
        interval = paired_interval(better, shared)
        covered += interval.low <= 0.5 <= interval.high
    assert 0.92 <= covered / 500 <= 0.98


def test_percentile_bootstrap_over_three_draws_would_cover_too_little():
    """Why the interval is built this way and not by resampling draws."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        table = simulate(rng, 40, 3, (0.2, 1.0, 0.5))
        means = [table[rng.integers(0, 40, 40)][:, rng.integers(0, 3, 3)].mean() for _ in range(200)]
        covered += np.quantile(means, 0.025) <= 0 <= np.quantile(means, 0.975)
    assert covered / 200 < 0.85


def test_one_draw_is_the_t_interval_over_cases_and_says_so():
    values = np.array([1.0, 2.0, 3.0, 4.0])
    interval = crossed_interval(values[:, None])
    assert interval.mean == pytest.approx(2.5)
    assert interval.high - interval.mean == pytest.approx(3.182446 * values.std(ddof=1) / 2, rel=1e-5)
    assert interval.covers == "cases"
    assert crossed_interval(values[None]).covers == "draws"


def test_degenerate_tables():
    assert np.isnan(crossed_interval(np.full((3, 2), np.nan)).mean)
    single = crossed_interval(np.array([[0.7]]))
    assert single.mean == 0.7
    assert np.isnan(single.low)
    assert not single.excludes_zero
    flat = crossed_interval(np.full((5, 3), 0.8))
    assert (flat.low, flat.high) == pytest.approx((0.8, 0.8))
    assert crossed_interval(np.zeros((5, 3))).p == 1.0
    with pytest.raises(ValueError, match="one shape"):
        paired_interval(np.zeros((3, 2)), np.zeros((2, 3)))
    with pytest.raises(ValueError, match="cases, draws"):
        crossed_interval(np.zeros(3))


def test_missing_cells_are_filled_by_the_additive_fit():
    table = np.add.outer([1.0, 5.0, 2.0], [0.0, 0.5, -0.25])
    holed = table.copy()
    holed[1, 2] = np.nan
    filled, missing = complete(holed)
    assert missing == 1
    np.testing.assert_allclose(filled, table, atol=1e-6)
    # the mean is not dragged down by the hole in the best case
    assert crossed_interval(holed).mean == pytest.approx(table.mean(), abs=1e-6)


def test_empty_rows_and_columns_are_left_out():
    table = np.arange(12.0).reshape(4, 3)
    padded = np.full((5, 4), np.nan)
    padded[:4, :3] = table
    assert crossed_interval(padded) == crossed_interval(table)


def test_paired_tests_match_scipy():
    from scipy import stats

    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((20, 4)) + 0.4, rng.standard_normal((20, 4))
    tests = paired_tests(a, b)
    assert tests.t_p == pytest.approx(stats.ttest_rel(a.mean(1), b.mean(1)).pvalue)
    assert tests.wilcoxon_p == pytest.approx(stats.wilcoxon(a.mean(1), b.mean(1)).pvalue)
    same = paired_tests(a, a)
    assert (same.t_p, same.wilcoxon_p) == (1.0, 1.0)
    assert np.isnan(paired_tests(a[:1], b[:1]).t_p)


def test_holm_known_answer():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    adjusted = holm([0.02, float("nan"), 0.5])
    assert adjusted[0] == pytest.approx(0.04)
    assert np.isnan(adjusted[1])
    assert holm([]) == []
