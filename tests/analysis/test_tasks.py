"""Ranks and effects over tasks: hand-made answers, coverage, and silence where nothing can be said."""

import math

import numpy as np
import pytest

from medseg_ssl.analysis.statistics import Interval, crossed_interval
from medseg_ssl.analysis.tasks import pool, ranked, standardised, summarise_tasks
from medseg_ssl.analysis.tasks_page import tasks_html

from .test_label_efficiency import BETTER, SCRATCH, pretrained_thrice, rows_of
from .test_statistics import simulate

MIDDLE = {b: (SCRATCH[b] + BETTER[b]) / 2 for b in SCRATCH}


def tasks_of(count, curves, **settings):
    """Tasks with cases of their own."""
    return {
        f"t{t}": [{**r, "case": f"t{t} {r['case']}"} for r in rows_of(curves, seed=t, **settings)]
        for t in range(count)
    }


def part(mean, error=0.1, freedom=4.0, cases=12, draws=4):
    return Interval(mean, mean, mean, 1.0, error, freedom, cases, draws, "cases and draws")


def test_ranks_of_cells_by_hand():
    first, second, third = np.array([[3.0, 1.0]]), np.array([[2.0, 1.0]]), np.array([[1.0, 0.1 + 0.2]])
    np.testing.assert_array_equal(ranked([first, second, third]), [[[1, 1.5]], [[2, 1.5]], [[3, 3]]])
    holed = ranked([first, np.array([[np.nan, 0.0]])])
    np.testing.assert_array_equal(holed, [[[np.nan, 1]], [[np.nan, 2]]])
    tied = ranked([np.array([[0.1 + 0.2]]), np.array([[0.3]])])
    np.testing.assert_array_equal(tied, [[[1.5]], [[1.5]]])


def test_ranks_add_up_and_say_nothing_of_other_tasks_where_there_are_few():
    found = summarise_tasks(
        tasks_of(2, {"scratch": SCRATCH, "mae": BETTER, "mid": MIDDLE}), baselines=["scratch"]
    )
    ranks = {init: about["rank"] for init, about in found["inits"].items()}
    assert sum(r["mean"] for r in ranks.values()) == pytest.approx(6.0)
    assert ranks["mae"]["mean"] < ranks["mid"]["mean"] < ranks["scratch"]["mean"]
    assert 1.0 <= ranks["mae"]["low"] <= ranks["mae"]["mean"] <= ranks["mae"]["high"] < 1.5
    assert math.isnan(ranks["mae"]["new_low"])
    assert found["inits"]["scratch"]["effects"] == {}
    line = found["verdicts"][1]
    assert line.startswith("mae: mean rank 1.0")
    assert " of 3 over 2 tasks (95 % interval 1.0" in line
    assert line.endswith("Nothing follows for other tasks: 2 of at least 4 tasks.")
    assert found["tasks"]["t0"]["budgets"] == [1, 2, 4, 8]
    assert found["tasks"]["t0"]["inits"]["mae"]["score"] == pytest.approx(0.81, abs=0.01)


def test_four_tasks_are_a_sample_of_tasks():
    found = pool([part(m) for m in (1.0, 1.2, 1.6, 1.8)], range(4), bounds=(1, 2))
    # t-interval of 1, 1.2, 1.6, 1.8: deviation 0.365148, three degrees of freedom
    assert found.mean == pytest.approx(1.4)
    assert found.new_high == pytest.approx(1.4 + 3.182446 * 0.182574)
    assert found.new_low == 1.0  # 0.82 is no rank
    # these tasks: errors of 0.1 / 2, 16 degrees of freedom
    assert found.low == pytest.approx(1.4 - 2.119905 * 0.05)
    assert found.reason == ""
    assert pool([part(1.9, error=0.5)], [0], bounds=(1, 2)).high == 2


def test_tasks_that_share_cases_add_their_errors_in_full():
    apart, shared = (pool([part(1.0), part(1.2)], blocks) for blocks in ([0, 1], [0, 0]))
    assert apart.high - apart.mean == pytest.approx(2.306004 * 0.1 / math.sqrt(2))  # eight degrees of freedom
    assert shared.high - shared.mean == pytest.approx(2.776445 * 0.1)
    curves = {"scratch": SCRATCH, "mae": BETTER}
    same = {f"t{t}": rows_of(curves, seed=t) for t in range(4)}
    rank = summarise_tasks(same, baselines=["scratch"])["inits"]["mae"]["rank"]
    assert (rank["blocks"], rank["reason"]) == (1, "tasks share cases or pretrainings")
    assert math.isnan(rank["new_low"])
    thrice = {name: pretrained_thrice(rows, "mae") for name, rows in tasks_of(4, curves).items()}
    assert summarise_tasks(thrice, baselines=["scratch"])["inits"]["mae"]["rank"]["blocks"] == 1
    assert summarise_tasks(tasks_of(4, curves), baselines=["scratch"])["inits"]["mae"]["rank"]["blocks"] == 4


def test_a_single_draw_gives_no_interval():
    found = pool([part(1.0), part(1.5, draws=1)], [0, 1])
    assert found.mean == 1.25
    assert math.isnan(found.low)


def test_inits_and_tasks_that_not_all_share_are_left_out_and_named():
    tasks = tasks_of(2, {"scratch": SCRATCH, "mae": BETTER})
    tasks["t1"] += rows_of({"only": BETTER})
    found = summarise_tasks({**tasks, "empty": []}, baselines=["scratch", "scratch_long"])
    assert found["left_out"] == ["empty", "only"]
    assert list(found["inits"]) == ["scratch", "mae"]
    assert summarise_tasks({}, baselines=["scratch"])["verdicts"] == []
    apart = {"a": rows_of({"x": SCRATCH}), "b": rows_of({"y": SCRATCH})}
    assert summarise_tasks(apart, baselines=[])["inits"] == {}
    assert summarise_tasks({"a": rows_of({"x": SCRATCH})}, baselines=["x"])["verdicts"] == []


def test_lower_is_better_for_distances():
    tasks = tasks_of(1, {"scratch": SCRATCH, "mae": BETTER})
    found = summarise_tasks(tasks, baselines=["scratch"], metric="hd95_mm")
    assert found["inits"]["mae"]["rank"]["mean"] > 1.9
    assert found["tasks"]["t0"]["inits"]["mae"]["score"] == pytest.approx(0.405, abs=0.01)
    assert found["inits"]["mae"]["effects"]["scratch"]["mean"] < 0


def test_standardised_effect_by_hand():
    baseline = np.array([[1.0], [2.0], [3.0], [4.0], [5.0]])[..., None].repeat(2, axis=1)
    found = standardised(baseline + np.array([[[0.9], [1.1]]]), baseline)
    # deviation of 1 … 5 is 1.581139, Hedges' correction for 4 degrees of freedom 0.8
    assert found.mean == pytest.approx(0.8 / 1.581139)
    # draws differ by 0.2: the crossed error is 0.1
    assert found.standard_error == pytest.approx(math.hypot(0.8 * 0.1 / 1.581139, found.mean / math.sqrt(8)))
    assert math.isnan(standardised(np.ones((5, 2, 1)), np.ones((5, 2, 1))).mean)


def test_a_task_too_small_for_an_effect_is_named():
    """A deviation between subjects needs three of them, and scores that differ."""
    curves = {"scratch": SCRATCH, "mae": BETTER}
    tasks = tasks_of(2, curves)
    tasks["small"] = [r for r in tasks_of(1, curves)["t0"] if r["case"].endswith(("case0", "case1"))]
    flat = [{**r, "dice": 0.5} if r["init"] == "scratch" else dict(r) for r in tasks["t1"]]
    tasks["flat"] = [{**r, "case": f"flat {r['case']}"} for r in flat]
    found = summarise_tasks(tasks, baselines=["scratch"])
    effect = found["inits"]["mae"]["effects"]["scratch"]
    why = "small has fewer than 3 subjects, flat has one score of scratch for all subjects"
    assert math.isnan(effect["mean"])
    assert effect["reason"] == why
    line = found["verdicts"][1]
    assert f"on these tasks); no effect against scratch: {why}. Nothing follows" in line
    assert found["inits"]["mae"]["rank"]["tasks"] == 4
    assert f"<td>–<small>{why}</small></td>" in tasks_html(found)
    with_all = summarise_tasks(tasks_of(2, curves), baselines=["scratch"])["inits"]["mae"]
    assert with_all["effects"]["scratch"]["reason"] == "2 of at least 4 tasks"


def test_pooled_ranks_and_effects_cover_the_truth():
    rng = np.random.default_rng(0)
    covered = {"rank": 0, "effect": 0}
    for _ in range(500):
        ranks, effects = [], []
        for shift in (0.0, 0.4, 0.8):
            hard = simulate(rng, 15, 4, (1.0, 0.0, 0.0))
            first, second = (hard + simulate(rng, 15, 4, (0.3, 0.2, 0.5)) for _ in range(2))
            ranks.append(crossed_interval(ranked([first, second])[0]))
            effects.append(standardised((first + shift)[..., None], second[..., None]))
        rank, effect = (pool(parts, range(3)) for parts in (ranks, effects))
        covered["rank"] += rank.low <= 1.5 <= rank.high
        # cases differ by 1 and by 0.3 of the init's own, the mean over four draws leaves 0.5² / 4
        truth = 0.4 / math.sqrt(1 + 0.09 + 0.0625)
        covered["effect"] += effect.low <= truth <= effect.high
    assert 0.92 <= covered["rank"] / 500 <= 0.98
    assert 0.92 <= covered["effect"] / 500 <= 0.98


def test_a_case_that_only_false_alarms_score_ranks_nobody():
    given = tasks_of(1, {"scratch": SCRATCH, "mae": BETTER}, noise=0.001)
    clear = summarise_tasks(given, baselines=["scratch"])["inits"]["mae"]
    for row in given["t0"]:
        if row["case"] in {f"t0 case{n}" for n in range(6)}:
            row["dice"] = 0.0 if row["draw"] == 0 else math.nan
    found = summarise_tasks(given, baselines=["scratch"])
    assert found["tasks"]["t0"]["cases"] == 6
    assert found["inits"]["mae"]["rank"]["mean"] == clear["rank"]["mean"] == 1.0


def test_the_page_ranks_inits_best_first_and_names_what_was_left_out():
    tasks = tasks_of(2, {"scratch": SCRATCH, "mae": BETTER})
    tasks["t0"] += [{**row, "init": "<own>"} for row in tasks["t0"] if row["init"] == "mae"]
    page = tasks_html(summarise_tasks(tasks, baselines=["scratch"]))
    assert page.index("<td>mae</td>") < page.index("<td>scratch</td>")
    assert "rank: t0" in page
    assert "effect against scratch" in page
    assert "left out: &lt;own&gt;" in page
    assert "Nothing follows for other tasks" in page
    assert tasks_html(summarise_tasks({}, baselines=[])) == ""
