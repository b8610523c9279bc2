"""Curves, areas, savings and verdicts on tables whose answers are known."""

import math

import numpy as np
import pytest

from medseg_ssl.analysis import label_efficiency as le

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
    table = le.tables(rows)["s", 1]
    np.testing.assert_allclose(table.scores_ND, [[0.8], [0.6]])
    none = le.tables([row("s", 1, 0, "x", "a", math.nan)])["s", 1]
    assert np.isnan(none.scores_ND).all()
    assert math.isnan(le.curve_rows([row("s", 1, 0, "x", "a", math.nan)])[0]["mean"])


def test_area_is_the_mean_over_log2_budget():
    tables = le.tables(rows_of({"s": {1: 0.6, 2: 0.7, 8: 0.9}}, noise=0.0))
    # 0..1: mean 0.65, 1..3: mean 0.8
    assert le.area(tables, "s", [1, 2, 8]).mean == pytest.approx((0.65 + 2 * 0.8) / 3)
    assert le.area(tables, "s", [2]).mean == pytest.approx(0.7)


def test_savings_known_answers():
    tables = le.tables(rows_of({"scratch": SCRATCH, "better": BETTER}, noise=0.0))
    found = {s["budget"]: s for s in le.savings(tables, init="better", baseline="scratch")}
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
        tables = le.tables(rows_of({"scratch": SCRATCH, "better": BETTER}, noise=noise))
        item = le.savings(tables, init="better", baseline="scratch")[1]
        assert item["ci_low"] <= item["savings"] <= item["ci_high"]
        return item["ci_high"] - item["ci_low"]

    assert width(0.01) < width(0.06)


def test_an_init_below_the_baseline_at_its_smallest_budget_has_an_upper_bound():
    tables = le.tables(rows_of({"scratch": SCRATCH, "worse": {1: 0.5, 2: 0.55}}))
    found = le.savings(tables, init="worse", baseline="scratch")
    assert [s["at_most"] for s in found] == [True, True]
    assert found[1]["savings"] == pytest.approx(0.5)
    assert found[1]["ci_low"] is None
    assert found[1]["ci_high"] == pytest.approx(0.5)


def test_savings_take_the_better_baseline():
    summary = le.summarise(
        rows_of({"scratch": SCRATCH, "scratch_long": LONG, "better": BETTER}, noise=0.001),
        baselines=["scratch", "scratch_long"],
    )
    first = summary["inits"]["better"]["savings"][0]
    assert first["baseline"] == "scratch"
    assert first["savings"] == pytest.approx(2.0, abs=0.05)
    assert "savings" not in summary["inits"]["scratch"]


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
    assert [c["mean"] for c in pooled] == pytest.approx([0.08, 0.1], abs=0.01)
    assert all(c["p_holm"] >= c["p"] for c in summary["comparisons"])


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
    assert le.format_number(float("nan")) == ""
    assert le.format_number(0.123456789) == "0.123457"
