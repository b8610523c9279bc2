"""Curves, areas, savings and verdicts on tables whose answers are known."""

import math
import re

import numpy as np
import pytest

from medseg_ssl.analysis import label_efficiency as le
from medseg_ssl.analysis import savings, scores
from medseg_ssl.analysis.statistics import holm
from medseg_ssl.analysis.tables import format_number

BUDGETS = (1, 2, 4, 8)


def rows_of(curves, *, cases=12, draws=4, noise=0.01, seed=0, shift=None):
    """Rows whose mean Dice is ``curves[init][budget]``, with crossed effects that the inits share."""
    rng = np.random.default_rng(seed)
    case_N, draw_D = 0.03 * rng.standard_normal(cases), 0.02 * rng.standard_normal(draws)
    case_N, draw_D = case_N - case_N.mean(), draw_D - draw_D.mean()
    rows = []
    for init, curve in curves.items():
        for budget, mean in curve.items():
            rest = noise * rng.standard_normal((cases, draws))
            for d in range(draws):
                for c in range(cases):
                    dice = mean + case_N[c] + draw_D[d] + rest[c, d]
                    for name in ("a", "b"):
                        rows.append(
                            row(init, budget, d, f"case{c}", name, dice + (0.1 if name == "a" else -0.1))
                        )
    return rows


def pretrained_thrice(rows, init, shifts=(-0.02, 0.0, 0.02)):
    """The rows with three pretrainings of one init, each shifted by its luck."""
    return [r for r in rows if r["init"] != init] + [
        {**r, "pretraining": number, "dice": r["dice"] + shift}
        for r in rows
        if r["init"] == init
        for number, shift in enumerate(shifts)
    ]


def row(init, budget, draw, case, name, dice):
    other = dict.fromkeys(("iou", "nsd", "hd95_mm", "precision", "recall"), dice / 2)
    head = {
        "task": "t",
        "source": "",
        "target": "MR",
        "init": init,
        "budget": budget,
        "draw": draw,
        "seed": 1,
    }
    return head | {"case": case, "class": name, "dice": dice, "nsd_tolerance_mm": 1.0} | other


SCRATCH = {1: 0.60, 2: 0.70, 4: 0.80, 8: 0.85}
LONG = {1: 0.58, 2: 0.68, 4: 0.78, 8: 0.84}
BETTER = {1: 0.70, 2: 0.80, 4: 0.84, 8: 0.90}


def test_curve_means_classes_then_cases_and_has_the_contract_columns():
    rows = rows_of({"scratch": SCRATCH}, noise=0.0)
    found = le.curve_rows(rows)
    assert tuple(found[0]) == le.CURVE_COLUMNS
    dice = {r["budget"]: r for r in found if r["metric"] == "dice"}
    assert {b: pytest.approx(r["mean"]) for b, r in dice.items()} == SCRATCH
    assert dice[1]["ci_low"] < 0.6 < dice[1]["ci_high"]
    assert (dice[1]["draws"], dice[1]["cases"]) == (4, 12)
    assert {r["metric"] for r in found} == {*le.METRICS, "dice:a", "dice:b"}
    assert next(r for r in found if r["metric"] == "dice:a")["mean"] == pytest.approx(0.7)


def test_empty_metrics_are_left_out_of_a_case_not_counted_as_zero():
    rows = [row("s", 1, 0, "x", "a", 0.8), row("s", 1, 0, "x", "b", math.nan), row("s", 1, 0, "y", "a", 0.6)]
    table = scores.tables(rows)["s", 1]
    np.testing.assert_allclose(table.scores_NDP.mean(axis=2), [[0.8], [0.6]])
    none = scores.tables([row("s", 1, 0, "x", "a", math.nan)])["s", 1]
    assert np.isnan(none.scores_NDP.mean(axis=2)).all()
    assert math.isnan(le.curve_rows([row("s", 1, 0, "x", "a", math.nan)])[0]["mean"])


def test_area_is_the_mean_over_log2_budget():
    tables = scores.tables(rows_of({"s": {1: 0.6, 2: 0.7, 8: 0.9}}, noise=0.0))
    # 0..1: mean 0.65, 1..3: mean 0.8
    assert le.area(tables, "s", [1, 2, 8]).mean == pytest.approx((0.65 + 2 * 0.8) / 3)
    assert le.area(tables, "s", [2]).mean == pytest.approx(0.7)


def test_savings_known_answers():
    tables = scores.tables(rows_of({"scratch": SCRATCH, "better": BETTER}, noise=0.0))
    found = {s["budget"]: s for s in savings.savings(tables, init="better", baseline="scratch")}
    # 0.70 is scratch at 2 labels, 0.80 at 4, 0.84 lies 4/5 of the way from log2(4) to log2(8)
    assert found[1]["savings"] == pytest.approx(2.0)
    assert found[2]["savings"] == pytest.approx(2.0)
    assert found[4]["savings"] == pytest.approx(2.0**2.8 / 4)
    assert not found[4]["censored"]
    assert found[8]["censored"]
    assert found[8]["savings"] == pytest.approx(1.0)
    assert found[8]["ci_high"] is None
    assert found[8]["ci_low"] == pytest.approx(1.0)


def test_savings_interval_holds_the_point_and_widens_with_noise():
    def width(noise):
        tables = scores.tables(rows_of({"scratch": SCRATCH, "better": BETTER}, noise=noise))
        item = savings.savings(tables, init="better", baseline="scratch")[1]
        assert item["ci_low"] <= item["savings"] <= item["ci_high"]
        return item["ci_high"] - item["ci_low"]

    assert width(0.01) < width(0.06)


def test_an_init_below_the_baseline_at_its_smallest_budget_has_an_upper_bound():
    tables = scores.tables(rows_of({"scratch": SCRATCH, "worse": {1: 0.5, 2: 0.55}}))
    found = savings.savings(tables, init="worse", baseline="scratch")
    assert [s["at_most"] for s in found] == [True, True]
    assert found[1]["savings"] == pytest.approx(0.5)
    assert found[1]["ci_low"] is None
    assert found[1]["ci_high"] == pytest.approx(0.5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cases", "draws", "noise", "level"),
    [(12, 3, 0.02, 0.76), (40, 5, 0.002, 0.76), (40, 5, 0.02, 0.62)],
)
def test_savings_interval_covers_the_true_savings(cases, draws, noise, level):
    """The baseline's curve is known, so the labels it needs for the init's true score are; 0.002: narrower than a
    step of the grid."""
    rng = np.random.default_rng(0)
    names, numbers = tuple(f"case{c}" for c in range(cases)), tuple(range(draws))
    truth = 2 ** np.interp(level, list(SCRATCH.values()), np.log2(BUDGETS)) / 2
    covered = 0
    for _ in range(500):
        case = 0.03 * rng.standard_normal((cases, 1))
        tables = {}
        for key, mean in {**{("scratch", b): m for b, m in SCRATCH.items()}, ("mae", 2): level}.items():
            own = rng.standard_normal((cases, 1)) + rng.standard_normal((1, draws))
            rest = 2 * rng.standard_normal((cases, draws))
            tables[key] = scores.Table(mean + case + noise * (own + rest), names, numbers)
        (found,) = savings.savings(tables, init="mae", baseline="scratch")
        low, high = found["ci_low"] or 0.0, found["ci_high"] or math.inf
        covered += low <= truth <= high
        assert low <= found["savings"] * (1 + 1e-9)
        assert found["savings"] <= high * (1 + 1e-9)
    assert 0.92 <= covered / 500 <= 0.98


def test_ends_narrower_than_a_step_of_the_grid_are_not_the_grid():
    tables = scores.tables(rows_of({"scratch": SCRATCH, "mae": {2: 0.77}}, noise=0.0005))
    (found,) = savings.savings(tables, init="mae", baseline="scratch")
    assert found["savings"] == pytest.approx(2.0**1.7 / 2, rel=0.01)
    assert 1.0 < found["ci_high"] / found["ci_low"] < 2.0 ** (1 / savings.SAVINGS_GRID)
    assert found["ci_low"] < found["savings"] < found["ci_high"]


def test_savings_take_the_better_baseline():
    summary = le.summarise(
        rows_of({"scratch": SCRATCH, "scratch_long": LONG, "better": BETTER}, noise=0.001),
        baselines=["scratch", "scratch_long"],
    )
    first = summary["inits"]["better"]["savings"][0]
    assert first["baseline"] == "scratch"
    assert first["savings"] == pytest.approx(2.0, abs=0.05)
    assert "savings" not in summary["inits"]["scratch"]
    each = summary["inits"]["better"]["savings_by_baseline"]
    assert list(each) == ["scratch", "scratch_long"]
    assert each["scratch"] == summary["inits"]["better"]["savings"]


def test_a_saving_against_the_laxer_baseline_alone_is_told_and_not_claimed():
    long = {budget: score + 0.1 for budget, score in SCRATCH.items()}
    rows = rows_of(
        {"scratch": SCRATCH, "scratch_long": long, "mae": {b: s + 0.1 for b, s in SCRATCH.items()}}
    )
    summary = le.summarise(rows, baselines=["scratch", "scratch_long"])
    (line,) = summary["verdicts"]
    assert {s["baseline"] for s in summary["inits"]["mae"]["savings"]} == {"scratch_long"}
    first = summary["inits"]["mae"]["savings_by_baseline"]["scratch"][0]
    assert first["ci_low"] > 1
    assert "No label saving is shown: " in line
    assert f"Against scratch alone {first['savings']:.2f} times with 1 label (95 % interval " in line
    assert line.endswith(": no claim, since scratch_long needs fewer.")


def test_of_two_bounds_the_baseline_that_scores_more_counts():
    curves = {"scratch": {1: 0.6}, "scratch_long": {1: 0.65}, "better": {1: 0.7}, "worse": {1: 0.5}}
    summary = le.summarise(rows_of(curves), baselines=["scratch", "scratch_long"], low_budgets=[1])
    (better,), (worse,) = (summary["inits"][init]["savings"] for init in ("better", "worse"))
    assert (better["baseline"], better["censored"]) == ("scratch_long", True)
    assert better["gap"] == pytest.approx(0.05, abs=0.02)
    assert (worse["baseline"], worse["at_most"]) == ("scratch_long", True)
    assert worse["gap"] == pytest.approx(-0.15, abs=0.02)


def test_verdict_names_both_baselines_and_numbers():
    summary = le.summarise(
        rows_of({"scratch": SCRATCH, "scratch_long": LONG, "better": BETTER}),
        baselines=["scratch", "scratch_long"],
    )
    (line,) = summary["verdicts"]
    assert line.startswith("better beats scratch and scratch_long at 1, 2 and 4 labels, significantly: +0.0")
    assert "12 cases × 4 draws" in line
    pooled = [c for c in summary["comparisons"] if c["scope"] == "low budgets"]
    (size,) = {f"{c['detectable']:.3f}" for c in pooled}
    limit = f"would miss a true difference below {size}, even before the correction. Labels saved ("
    assert limit in line
    told = {s["budget"]: s for s in summary["inits"]["better"]["savings"]}
    assert f"{told[1]['savings']:.2f} times with 1 label (95 % interval " in line
    assert line.endswith(
        "; the interval lies above 1 at 1, 2 and 4, each by itself and without a correction."
    ), line
    assert [c["mean"] for c in pooled] == pytest.approx([0.08, 0.1], abs=0.01)
    assert all(c["p_holm"] >= c["p"] for c in summary["comparisons"])


def test_a_verdict_says_that_no_saving_is_shown_and_that_two_draws_are_few():
    rows = rows_of({"scratch": SCRATCH, "mae": SCRATCH}, noise=0.05)
    line = le.summarise(rows, baselines=["scratch"])["verdicts"][0]
    assert "No label saving is shown: " in line
    assert line.endswith("; no interval lies above 1.")
    assert "two draws" not in line
    better = rows_of({"scratch": SCRATCH, "mae": BETTER}, noise=0.01)
    lone = [
        row for row in better if row["draw"] == 0 or row["budget"] < 4
    ]  # savings need every budget's draws
    line = le.summarise(lone, baselines=["scratch"], low_budgets=[1, 2])["verdicts"][0]
    assert line.endswith("; a single draw or case judges nothing.")
    few = [row for row in rows if row["draw"] < 2]
    line = le.summarise(few, baselines=["scratch"])["verdicts"][0]
    assert (
        "Over two draws such intervals held the truth in 86 to 98 of 100 simulations, by what varies, not in 95."
        in line
    )


def test_verdict_says_when_nothing_is_significant_or_worse():
    same = le.summarise(rows_of({"scratch": SCRATCH, "mae": SCRATCH}, noise=0.05), baselines=["scratch"])
    assert "mae shows no significant difference from scratch" in same["verdicts"][0]
    worse = le.summarise(rows_of({"scratch": SCRATCH, "mae": {1: 0.5, 2: 0.6}}), baselines=["scratch"])
    assert "mae is significantly worse than scratch at 1 and 2 labels" in worse["verdicts"][0]
    mixed = le.summarise(
        rows_of({"scratch": LONG, "scratch_long": BETTER, "mae": SCRATCH}),
        baselines=["scratch", "scratch_long"],
    )
    assert "beats scratch and is significantly worse than scratch_long" in mixed["verdicts"][0]
    assert "no saving can be claimed" in mixed["verdicts"][0]


def test_verdict_of_one_budget_that_counts_as_many_labels():
    """Neither few labels nor an area: the one difference there is."""
    rows = rows_of({"scratch": {16: 0.70}, "mae": {16: 0.80}})
    (line,) = le.summarise(rows, baselines=["scratch"], low_budgets=[2])["verdicts"]
    assert line.startswith("mae beats scratch at 16 labels, significantly")
    (line,) = le.summarise([r for r in rows if r["init"] == "mae"], baselines=[], low_budgets=[2])["verdicts"]
    assert line.startswith("No scratch baseline has finished fits yet")


def test_a_case_that_only_false_alarms_score_dilutes_no_difference():
    """Six cases differ by .05; six hold no class, and both inits raise a false alarm in the first draw alone."""
    rows = rows_of({"scratch": {1: 0.70}, "mae": {1: 0.75}}, noise=0.001)
    absent = {f"case{i}" for i in range(6)}
    for row in rows:
        if row["case"] in absent:
            row["dice"] = 0.0 if row["draw"] == 0 else float("nan")
    summary = le.summarise(rows, baselines=["scratch"])
    first = summary["comparisons"][0]
    assert first["mean"] == pytest.approx(0.05, abs=0.002)
    assert (first["cases"], first["partly"], first["one_sided"]) == (6, 6, 0)
    assert (
        "6 (scratch) of the cases have a pair of scores under some of the draws alone"
        in summary["verdicts"][0]
    )
    (saved,) = summary["inits"]["mae"]["savings"]
    assert saved["cases"] == 6
    # a fit that is not finished leaves no case out: not a draw, and not a fold of one
    rows = [row for row in rows if row["init"] == "scratch" or row["draw"] != 3]
    rows = [row for row in rows if row["draw"] != 2 or row["case"] not in ("case7", "case8")]
    first = le.summarise(rows, baselines=["scratch"])["comparisons"][0]
    assert (first["cases"], first["partly"]) == (6, 6)


def test_a_false_alarm_in_one_class_is_no_miss_of_another():
    """Both inits find what is there alike; one predicts, in one draw, a class that half of the cases lack."""
    rows = rows_of({"scratch": {1: 0.70, 2: 0.72}, "mae": {1: 0.75, 2: 0.77}}, noise=0.001)
    absent = {f"case{i}" for i in range(6)}
    plain = le.summarise(rows, baselines=["scratch"])
    name = max(row["class"] for row in rows)
    for row in rows:
        if row["case"] in absent and row["class"] == name:
            row["dice"] = 0.0 if (row["init"], row["draw"]) == ("mae", 0) else float("nan")
    summary = le.summarise(rows, baselines=["scratch"])
    for found in summary["comparisons"]:
        assert found["mean"] == pytest.approx(0.05, abs=0.002)
        assert found["low"] > 0.04, (
            "a mean over classes with the false alarm would be half as high in six cases"
        )
        assert (found["cases"], found["partly"], found["one_sided"]) == (12, 0, 0)
        assert found["false_alarms"] == 6
    (line,) = summary["verdicts"]
    assert "6 (scratch) classes of a case have a score under some of these fits alone" in line
    assert all(found["false_alarms"] == 0 for found in plain["comparisons"])
    assert "under some of these fits alone" not in plain["verdicts"][0]
    third = [{**row, "init": "third", "dice": 0.4} for row in rows if row["init"] == "mae"]
    joined = le.summarise([*rows, *third], baselines=["scratch"])["comparisons"]
    own = [{k: v for k, v in c.items() if not k.endswith("_holm")} for c in joined if c["init"] == "mae"]
    alone = [{k: v for k, v in c.items() if not k.endswith("_holm")} for c in summary["comparisons"]]
    assert own == alone, "what a third init predicts changes nothing between two"
    quiet = [r for r in rows if r["dice"] != 0]
    without = le.summarise(quiet, baselines=["scratch"])["inits"]["mae"]["area"]
    assert summary["inits"]["mae"]["area"] < without - 0.04, "means keep it"
    # of a subject's two scans one lacks everything
    rows = rows_of({"scratch": {1: 0.70}, "mae": {1: 0.75}}, noise=0.001)
    for row in rows:
        row["subject"] = f"subject{int(row['case'].removeprefix('case')) // 2}"
        if row["case"] in absent and int(row["case"].removeprefix("case")) % 2:
            row["dice"] = 0.0 if (row["init"], row["draw"]) == ("mae", 0) else float("nan")
    (found, *_) = le.summarise(rows, baselines=["scratch"])["comparisons"]
    assert found["low"] > 0.04
    assert found["cases"] == 6


def test_tests_on_case_means_are_corrected_within_their_scope():
    curves = {"scratch": SCRATCH} | {
        f"i{n}": {b: m + 0.004 * n for b, m in SCRATCH.items()} for n in (1, 2, 3)
    }
    found = le.summarise(rows_of(curves, noise=0.02), baselines=["scratch"])["comparisons"]
    scopes = {item["scope"] for item in found}
    assert len(scopes) == 6
    for scope in scopes:
        of_scope = [item for item in found if item["scope"] == scope]
        assert len(of_scope) == 3
        for column in ("p", "t_p", "wilcoxon_p"):
            assert [i[f"{column}_holm"] for i in of_scope] == holm([i[column] for i in of_scope]), column
    assert any(item["wilcoxon_p_holm"] > item["wilcoxon_p"] for item in found)


def test_verdict_counts_scores_without_a_partner():
    """A class that is absent has a score only where an init predicted it: 0."""
    rows = rows_of({"scratch": {1: 0.70}, "mae": {1: 0.70}})
    for row in rows:
        if row["case"] in ("case0", "case1"):
            row["dice"] = 0.0 if row["init"] == "mae" else float("nan")
    summary = le.summarise(rows, baselines=["scratch"])
    assert summary["comparisons"][0]["one_sided"] == 2 * 4
    assert "8 of the scores (scratch) have no partner" in summary["verdicts"][0]
    rows = rows_of({"scratch": {1: 0.70, 2: 0.70}, "mae": {1: 0.70, 2: 0.70}})
    for row in rows:
        if row["case"] == "case0":  # a false alarm with one label, none with two
            row["dice"] = 0.0 if row["init"] == "mae" and row["budget"] == 1 else float("nan")
    (line,) = le.summarise(rows, baselines=["scratch"])["verdicts"]
    assert "4 of the scores (scratch) have no partner" in line


def test_verdict_of_two_cases_says_that_they_are_few():
    rows = rows_of({"scratch": {1: 0.70, 2: 0.75}, "mae": {1: 0.80, 2: 0.85}}, cases=2)
    (line,) = le.summarise(rows, baselines=["scratch"])["verdicts"]
    assert "Over two cases such intervals held the truth in 86 to 98 of 100 simulations" in line


def test_verdict_says_where_holm_takes_the_claim_away():
    curves = {"scratch": SCRATCH, "mae": {b: m + 0.018 for b, m in SCRATCH.items()}}
    alone = le.summarise(rows_of(curves, noise=0.03), baselines=["scratch"])
    (comparison,) = [c for c in alone["comparisons"] if c["scope"] == "low budgets"]
    assert 0.01 < comparison["p"] < 0.05
    assert "mae beats scratch at 1, 2 and 4 labels, significantly: " in alone["verdicts"][0]
    others = {f"other{n}": SCRATCH for n in range(5)}
    many = le.summarise(rows_of(curves | others, noise=0.03), baselines=["scratch"])
    told = many["verdicts"][0]
    assert told.startswith(
        "mae shows no significant difference from scratch at 1, 2 and 4 labels (against scratch "
    )
    assert "excludes 0 only without Holm's correction for all inits)" in told
    assert "beats" not in told
    assert "No label saving is shown" in told


def test_what_cannot_be_judged_costs_the_others_nothing():
    """A pair of a single draw is shown without a verdict, so Holm does not count it."""
    rows = rows_of({"scratch": SCRATCH, "mae": BETTER, "other": BETTER}, noise=0.03)
    alone = le.summarise([r for r in rows if r["init"] != "other"], baselines=["scratch"])["comparisons"]
    beside = [r for r in rows if r["init"] != "other" or r["draw"] == 0]
    found = le.summarise(beside, baselines=["scratch"])["comparisons"]
    assert [c["p_holm"] for c in found if c["init"] == "mae"] == [c["p_holm"] for c in alone]
    assert all(math.isnan(c["p_holm"]) for c in found if c["init"] == "other")


def test_detectable_difference_stands_in_every_comparison():
    rows = rows_of({"scratch": SCRATCH, "mae": SCRATCH})
    for found in le.summarise(rows, baselines=["scratch"])["comparisons"]:
        # the noise decides: at least what a normal test with a known error would need
        assert found["detectable"] > 2.8 * found["standard_error"]
    single = le.summarise([r for r in rows if r["draw"] == 0], baselines=["scratch"])
    assert all(math.isnan(found["detectable"]) for found in single["comparisons"])
    assert "12 cases × 1 draw)" in single["verdicts"][0]


def test_pretrainings_are_a_level_of_their_own():
    rows = rows_of({"scratch": SCRATCH, "mae": BETTER})
    once, thrice = (
        le.summarise(rows, baselines=["scratch"]),
        le.summarise(pretrained_thrice(rows, "mae"), baselines=["scratch"]),
    )
    for before, after in zip(once["comparisons"], thrice["comparisons"], strict=True):
        assert after["mean"] == pytest.approx(before["mean"])
        assert (before["pretrainings"], after["pretrainings"]) == (1, 3)
        assert after["covers"] == "cases, draws and pretrainings"
        assert after["standard_error"] > 2 * before["standard_error"]
        assert after["detectable"] > 2 * before["detectable"]
    assert "12 cases × 4 draws × 3 pretrainings" in thrice["verdicts"][0]
    low, high = (s["inits"]["mae"]["savings"][0] for s in (thrice, once))
    assert low["ci_low"] < high["ci_low"] < high["ci_high"] < low["ci_high"]
    wide, narrow = (
        next(r for r in le.curve_rows(r_) if r["init"] == "mae")
        for r_ in (pretrained_thrice(rows, "mae"), rows)
    )
    assert wide["ci_high"] > narrow["ci_high"]
    assert tuple(wide) == le.CURVE_COLUMNS


def test_unfinished_pretrainings_compare_what_is_there():
    rows = pretrained_thrice(rows_of({"scratch": SCRATCH, "mae": BETTER}), "mae")
    part = [r for r in rows if r.get("pretraining") != 2 or r["budget"] < 4]
    found = {c["scope"]: c for c in le.summarise(part, baselines=["scratch"])["comparisons"]}
    assert found["budget 1"]["pretrainings"] == 3
    assert found["budget 8"]["pretrainings"] == 2
    assert found["area"]["pretrainings"] == 2
    table = scores.tables(rows)["mae", 1]
    np.testing.assert_allclose(
        table.scores_NDP.mean(axis=2),
        scores.tables(rows_of({"scratch": SCRATCH, "mae": BETTER}))["mae", 1].scores_NDP.mean(axis=2),
        atol=1e-12,
    )
    assert (table.scores_NDP.shape, table.pretrainings) == ((12, 4, 3), (0, 1, 2))
    assert scores.tables(rows)["scratch", 1].pretrainings == ()


def test_partial_and_unequal_tables_compare_what_they_share():
    rows = rows_of({"scratch": SCRATCH, "mae": BETTER})
    part = [r for r in rows if not (r["init"] == "mae" and (r["draw"] == 3 or r["budget"] == 8))]
    summary = le.summarise(part, baselines=["scratch", "scratch_long"])
    assert summary["baselines"] == ["scratch"]
    assert summary["inits"]["mae"]["area_budgets"] == [1, 2, 4]
    assert {c["draws"] for c in summary["comparisons"]} == {3}
    single = [r for r in rows if r["draw"] == 0]
    assert (
        "mae cannot be judged against scratch" in le.summarise(single, baselines=["scratch"])["verdicts"][0]
    )
    assert le.summarise([], baselines=["scratch"])["verdicts"] == []


def test_cases_csv_reads_back(tmp_path):
    path = tmp_path / "cases.csv"
    line = "t,,MR,scratch,1,0,7,abc,a,0.5,,,,,0.1,0.2"
    path.write_text(",".join(le.CASE_COLUMNS) + "\n" + line + "\n", encoding="utf-8")
    (found,) = le.read_cases(path)
    assert (found["budget"], found["dice"], found["recall"]) == (1, 0.5, 0.2)
    assert math.isnan(found["hd95_mm"])
    assert found["pretraining"] == 0
    assert le.CASE_COLUMNS[-1] == "pretraining"
    path.write_text(f"{','.join(le.CASE_COLUMNS)}\n{line},2\n{line},\n", encoding="utf-8")
    assert [r["pretraining"] for r in le.read_cases(path)] == [2, 0]
    assert format_number(float("nan")) == ""
    assert format_number(0.123456789) == "0.123457"


def test_verdict_names_the_limit_of_each_baseline_where_they_differ():
    rows = rows_of({"scratch": SCRATCH, "long": BETTER, "mae": SCRATCH}, noise=0.03)
    (line,) = le.summarise(pretrained_thrice(rows, "mae"), baselines=["scratch", "long"])["verdicts"]
    assert "no significant difference from scratch and is significantly worse than long at" in line
    assert re.search(
        r"true difference below 0\.\d{3} \(scratch\) or 0\.\d{3} \(long\), even before the correction\. ",
        line,
    )


def test_cases_of_one_subject_are_one_piece_of_evidence():
    rows = [
        {**row("scratch", 1, draw, case, "a", dice), "subject": subject}
        for draw in (0, 1)
        for case, subject, dice in (("c0", "s0", 0.2), ("c1", "s0", 0.4), ("c2", "s1", 0.9))
    ]
    table = scores.tables(rows)["scratch", 1]
    assert table.cases == ("s0", "s1")
    np.testing.assert_allclose(table.scores_NDP[:, :, 0], [[0.3, 0.3], [0.9, 0.9]])
    without = [{k: v for k, v in r.items() if k != "subject"} for r in rows]
    assert scores.tables(without)["scratch", 1].cases == ("c0", "c1", "c2")


@pytest.mark.parametrize(
    ("low", "high", "first", "expected"),
    [
        # below the baseline's fewest labels, and a noisy budget further on allows what lies there
        ([-0.3, -0.3, -0.2], [-0.1, 0.1, 0.1], 0, (None, None)),
        # never reached, and a noisy budget before allows what lies there
        ([-0.1, -0.1, 0.1], [0.2, 0.2, 0.3], None, (None, None)),
        ([0.1, -0.1, -0.3], [0.3, 0.1, -0.1], 1, (pytest.approx(2**1.5), pytest.approx(2**2.5))),
    ],
)
def test_an_interval_of_savings_holds_its_bound(low, high, first, expected):
    labels = np.array([2.0, 4.0, 8.0])
    low_G, high_G = np.array(low), np.array(high)
    possible = np.flatnonzero((low_G <= 0) & (high_G >= 0))
    assert savings._ends(labels, low_G, high_G, possible, first=first) == expected
