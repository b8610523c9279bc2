"""Intervals for crossed random effects cover what they say; tests agree with known answers."""

import numpy as np
import pytest

from medseg_ssl.analysis.statistics import (
    complete,
    crossed_interval,
    detectable_difference,
    holm,
    paired_interval,
    paired_tests,
)

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
    for cases, draws in ((12, 3), (12, 5), (50, 3)):
        assert 0.92 <= coverage(cases, draws, MIXES["balanced"], runs=1500) <= 0.98
        assert 0.92 <= coverage(cases, draws, MIXES["cases only"]) <= 0.98
    assert 0.92 <= coverage(40, 5, MIXES["balanced"], missing=0.1) <= 0.98
    assert 0.92 <= coverage(40, 5, MIXES["rest"], missing=0.1) <= 0.98


@pytest.mark.parametrize(("cases", "draws"), [(12, 2), (100, 2), (2, 3)])
def test_coverage_with_two_of_something_is_what_the_verdicts_say(cases, draws):
    for mix in MIXES.values():
        assert (
            0.84 <= coverage(cases, draws, mix, runs=300) <= 0.99
        )  # 86 to 98, but for the simulation's own error


MIXES_OF_THREE = {
    # case, draw, pretraining, case × draw, case × pretraining, fit (draw × pretraining), rest
    "balanced": (1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0),
    "paired": (0.3, 0.4, 0.3, 0.3, 0.3, 0.4, 0.5),
    "cases": (2.0, 0.3, 0.3, 0.3, 0.3, 0.3, 0.5),
    "pretrainings": (0.3, 0.2, 1.0, 0.3, 0.3, 0.3, 0.5),
    "no pretraining effect": (0.3, 0.5, 0.0, 0.2, 0.0, 0.3, 0.5),
    "no draw effect": (0.3, 0.0, 0.5, 0.2, 0.1, 0.3, 0.5),
    "cases only": (1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.5),
}


def simulate_three(rng, shape, mix):
    cases, draws, layers = shape
    sizes = [
        *((cases, 1, 1), (1, draws, 1), (1, 1, layers)),
        *((cases, draws, 1), (cases, 1, layers), (1, draws, layers), shape),
    ]
    return sum(s * rng.standard_normal(size) for s, size in zip(mix, sizes, strict=True))


def coverage_of_three(shape, mix, *, missing=0.0, runs=500, seed=0):
    rng = np.random.default_rng(seed)
    covered = 0
    for _ in range(runs):
        table = simulate_three(rng, shape, mix)
        if missing:
            table[rng.random(shape) < missing] = np.nan
        interval = crossed_interval(table)
        assert interval.covers == "cases, draws and pretrainings"
        covered += interval.low <= 0 <= interval.high
    return covered / runs


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(12, 5, 3), (50, 3, 3)], ids=str)
@pytest.mark.parametrize("mix", MIXES_OF_THREE.values(), ids=MIXES_OF_THREE.keys())
def test_95_percent_interval_covers_the_mean_over_pretrainings_too(mix, shape):
    assert 0.92 <= coverage_of_three(shape, mix, seed=shape[0]) <= 0.98


def test_missing_scores_of_several_pretrainings():
    assert 0.92 <= coverage_of_three((30, 3, 3), MIXES_OF_THREE["paired"], missing=0.03) <= 0.98


def test_leaving_pretrainings_out_of_the_interval_would_cover_too_little():
    """Why a third level: the mean over pretrainings, taken as one more precise table, hides their spread."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        interval = crossed_interval(
            simulate_three(rng, (20, 5, 3), MIXES_OF_THREE["pretrainings"]).mean(axis=2)
        )
        covered += interval.low <= 0 <= interval.high
    assert covered / 200 < 0.8


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


@pytest.mark.parametrize("freedom", [4, 11])
def test_detectable_difference_is_found_as_often_as_it_says(freedom):
    """Known answer: a one-sample t-test, whose standard error is known, in 20 000 samples."""
    rng = np.random.default_rng(freedom)
    samples = rng.standard_normal((20000, freedom + 1))
    shift = detectable_difference(1 / np.sqrt(freedom + 1), freedom)
    from scipy import stats

    t, p = stats.ttest_1samp(samples + shift, 0.0, axis=1)
    assert ((p < 0.05) & (t > 0)).mean() == pytest.approx(0.8, abs=0.01)
    # the formula of power tables (Cohen 1988): one minus the noncentral t beyond the critical value
    edge = stats.t.ppf(0.975, freedom)
    assert stats.nct.sf(edge, freedom, shift * np.sqrt(freedom + 1)) == pytest.approx(0.8, abs=1e-6)


def test_detectable_difference_of_crossed_tables():
    """With the error of a design known, differences of that size are found in four of five comparisons."""
    rng = np.random.default_rng(0)
    cases, draws = 30, 5
    # expected mean squares of standard deviations 0.5 (cases), 0.3 (draws) and 1 (rest), and what Satterthwaite makes
    case, draw, rest = draws * 0.25 + 1, cases * 0.09 + 1, 1.0
    error = np.sqrt((case + draw - rest) / (cases * draws))
    freedom = (case + draw - rest) ** 2 / (case**2 / 29 + draw**2 / 4 + rest**2 / 116)
    shift = detectable_difference(error, freedom)
    found, sizes = 0, []
    for _ in range(500):
        interval = crossed_interval(simulate(rng, cases, draws, (0.5, 0.3, 1.0)) + shift)
        found += interval.low > 0
        sizes.append(detectable_difference(interval.standard_error, interval.freedom))
    assert 0.75 <= found / 500 <= 0.85
    assert np.median(sizes) == pytest.approx(shift, rel=0.15)


def test_detectable_difference_known_answers():
    # many degrees of freedom: 1.95996 + 0.84162 standard errors
    assert detectable_difference(2.0, 1e6) == pytest.approx(2 * 2.80159, rel=1e-4)
    assert detectable_difference(1.0, 10, power=0.9) > detectable_difference(1.0, 10)
    assert detectable_difference(0.0, 4) == 0.0
    assert np.isnan(detectable_difference(float("nan"), 4))
    with pytest.raises(ValueError, match="power"):
        detectable_difference(1.0, 4, power=0.04)


GOLDEN = {
    "both": (0.24762103273319802, -0.7859218608049983, 0.5820071480581053, 6.267637368955533),
    "cases": (0.06954506688527573, -0.5665224677802236, 0.7980157316098979, 6.0),
    "draws": (0.2010898074049499, -1.0291352800632219, 0.6407538431689287, 3.0384551930238497),
    "holed": (0.2690825990551546, -0.7427261453681182, 0.5468448602762734, 6.711913446477605),
    "one draw": (0.8685392724505595, 0.3012558717417091, 0.009550797691616984, 6.0),
    "one case": (1.2087357926251634, 0.3840777252697296, 0.018597421846227896, 3.0),
}


def golden_table(name):
    n, d = np.arange(7.0)[:, None], np.arange(4.0)[None]
    case, draw, rest = np.sin(3 * n + 1), np.cos(2 * d), np.sin(5 * n * d + d)
    both = case + 0.8 * draw + 0.4 * rest
    holed = both.copy()
    holed[2, 1] = holed[5, 3] = np.nan
    return {
        "both": both,
        "cases": case + 0.4 * rest,
        "draws": 0.9 * draw + 0.3 * rest,
        "holed": holed,
        "one draw": both[:, :1],
        "one case": both[:1],
    }[name]


@pytest.mark.parametrize("name", GOLDEN)
def test_one_pretraining_gives_what_two_levels_gave(name):
    """Numbers of the two-way code before there was a third level."""
    table = golden_table(name)
    interval = crossed_interval(table)
    found = (interval.mean, interval.low, interval.p, interval.freedom)
    # gaps were filled by an iteration that stopped at 1e-9
    assert found == pytest.approx(GOLDEN[name], rel=1e-8 if name == "holed" else 1e-12)
    assert crossed_interval(table[..., None]) == interval
    assert interval.pretrainings == 1


def effects_of(*shape):
    """A table with effects ±a of each kind on two-level axes: the sums of squares can be read off."""
    table = np.zeros(shape)
    return [
        table + np.array([-1.0, 1.0]).reshape([2 if a == axis else 1 for a in range(3)]) for axis in range(3)
    ]


def test_two_way_mean_squares_by_hand():
    # case means 1, 2, 6 and draw means 2, 4 around 3; the rest is ±1, ∓1, 0
    table = np.array([[0.0 + 1, 2 - 1], [1 - 1, 3 + 1], [5.0, 7.0]])
    # MS_case = 2 · (4 + 1 + 9)/2 = 14, MS_draw = 3 · (1 + 1)/1 = 6, MS_rest = 4/2 = 2: variance (14 + 6 − 2)/6
    interval = crossed_interval(table)
    assert interval.mean == pytest.approx(3.0)
    assert interval.standard_error == pytest.approx(np.sqrt(3.0))
    assert interval.freedom == pytest.approx(18**2 / (14**2 / 2 + 6**2 / 1 + 2**2 / 2))


def test_three_way_mean_squares_by_hand():
    case, draw, layer = effects_of(2, 2, 2)
    # each mean square is 8 a² on one degree of freedom: cases 9, draws 16, pretrainings 25, fits 4,
    # cases × draws 1, cases × pretrainings 0.25, rest 0.0625, times 8
    table = 3 * case + 4 * draw + 5 * layer + 2 * draw * layer
    table += case * draw + 0.5 * case * layer + 0.25 * case * draw * layer
    interval = crossed_interval(table)
    combined = 8 * (9 + 16 + 25 - 4 - 1 - 0.25 + 0.0625)
    spread = 64 * (81 + 256 + 625 + 16 + 1 + 0.0625 + 0.0625**2)
    assert interval.mean == pytest.approx(0.0, abs=1e-12)
    assert interval.standard_error == pytest.approx(np.sqrt(combined / 8))
    assert interval.freedom == pytest.approx(combined**2 / spread)
    assert (interval.cases, interval.draws, interval.pretrainings) == (2, 2, 2)


def test_components_below_zero_are_pooled():
    case, draw, layer = effects_of(2, 2, 2)
    # pretrainings (1) and cases (0.5²) fall below what their interactions alone make: what is left are the draws
    table = 4 * draw + layer + 2 * draw * layer + 0.5 * case + case * draw + 0.25 * case * draw * layer
    interval = crossed_interval(table)
    assert interval.standard_error == pytest.approx(4.0)
    assert interval.freedom == pytest.approx(1.0)
    # nothing but fits: draws, pretrainings and fits are three estimates of one variance
    fits = crossed_interval(draw + layer + 2 * draw * layer)
    assert fits.standard_error == pytest.approx(np.sqrt((1 + 1 + 4) / 3))
    assert fits.freedom == pytest.approx(3.0)


def test_levels_of_one_are_no_levels():
    table = golden_table("both")
    for axis, covers in ((1, "cases and pretrainings"), (0, "draws and pretrainings")):
        moved = crossed_interval(np.expand_dims(table, axis))
        assert (moved.low, moved.high) == pytest.approx(
            (crossed_interval(table).low, crossed_interval(table).high)
        )
        assert moved.covers == covers
    alone = crossed_interval(table[:1, :1, None].repeat(1, axis=2))
    assert (alone.covers, alone.pretrainings) == ("nothing", 1)
    only = crossed_interval(np.array([[[1.0, 2.0, 4.0]]]))
    assert (only.covers, only.freedom) == ("pretrainings", 2.0)


def test_baseline_without_pretrainings_stands_beside_each():
    rng = np.random.default_rng(0)
    baseline = simulate(rng, 9, 4, (1.0, 0.5, 0.3))
    table = baseline[..., None] + 0.3 + 0.1 * rng.standard_normal((9, 4, 3))
    found = paired_interval(table, baseline)
    assert found == paired_interval(table, np.repeat(baseline[..., None], 3, axis=2))
    assert found.mean == pytest.approx(0.3, abs=0.03)
    assert (found.draws, found.pretrainings) == (4, 3)
    assert paired_tests(table, baseline) == paired_tests(table.mean(axis=2), baseline)
    with pytest.raises(ValueError, match="one shape"):
        paired_interval(table, table[..., :2])


def test_gaps_of_several_pretrainings():
    rng = np.random.default_rng(0)
    case, draw, layer = (rng.standard_normal(s) for s in ((8, 1, 1), (1, 4, 1), (1, 1, 3)))
    table = case + draw + layer + case * draw + case * layer + draw * layer
    holed = table.copy()
    holed[2, 1, 0] = holed[5, 3, 2] = np.nan
    filled, missing = complete(holed)
    assert missing == 2
    np.testing.assert_allclose(filled, table, atol=1e-6)
    # a fit that has not finished: the draw goes, since it costs fewer fits than the pretraining
    unfinished = table.copy()
    unfinished[:, 1, 2] = np.nan
    np.testing.assert_allclose(complete(unfinished)[0], np.delete(table, 1, axis=1))
    # a case without any score under one pretraining goes
    unfinished = table.copy()
    unfinished[4, :, 1] = np.nan
    np.testing.assert_allclose(complete(unfinished)[0], np.delete(table, 4, axis=0))
    assert complete(np.full((3, 2, 2), np.nan))[0].size == 0


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
    # three levels and ties: means that differ by their rounding alone share a rank
    pretrained = np.round(rng.standard_normal((20, 4, 3)), 1)
    means = np.round(pretrained.mean(axis=(1, 2)) - np.round(b, 1).mean(1), 12)
    found = paired_tests(pretrained, np.round(b, 1))
    assert found.wilcoxon_p == pytest.approx(stats.wilcoxon(means).pvalue)
    assert found.t_p == pytest.approx(stats.ttest_1samp(means, 0.0).pvalue)
    same = paired_tests(a, a)
    assert (same.t_p, same.wilcoxon_p) == (1.0, 1.0)
    assert np.isnan(paired_tests(a[:1], b[:1]).t_p)


def test_holm_known_answer():
    # Holm (1979): 3 · 0.01, then 2 · 0.02 against what came before, then 0.015 · 1 raised to it
    assert holm([0.02, 0.01, 0.04]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    adjusted = holm([0.02, float("nan"), 0.5])
    assert adjusted[0] == pytest.approx(0.04)
    assert np.isnan(adjusted[1])
    assert holm([]) == []
