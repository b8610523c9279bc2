"""Case by case: means over shared draws, worst first, and what went wrong in words."""

import json
import math
import re

import numpy as np
import pytest

from medseg_ssl.analysis.cases import MEAN, case_scores, scatter_html, shortcomings, worst_cases_html


def rows_of(dice):
    """Rows from {(init, budget, draw, case): {class: Dice}}."""
    return [
        {"init": i, "budget": b, "draw": d, "case": c, "class": name, "dice": value}
        for (i, b, d, c), classes in dice.items()
        for name, value in classes.items()
    ]


@pytest.fixture
def scores():
    return case_scores(
        rows_of(
            {
                ("scratch", 2, 0, "easy"): {"a": 0.8, "b": 0.6},
                ("scratch", 2, 1, "easy"): {"a": 0.6, "b": math.nan},
                ("scratch", 2, 2, "easy"): {"a": 0.0, "b": 0.0},  # a draw that mae lacks
                ("scratch", 2, 0, "hard"): {"a": 0.2, "b": 0.4},
                ("scratch", 2, 1, "hard"): {"a": 0.2, "b": 0.2},
                ("mae", 2, 0, "easy"): {"a": 0.9, "b": 0.9},
                ("mae", 2, 1, "easy"): {"a": 0.9, "b": 0.9},
                ("mae", 2, 0, "hard"): {"a": 0.5, "b": 0.5},
                ("mae", 2, 1, "hard"): {"a": 0.5, "b": 0.5},
                ("mae", 1, 0, "easy"): {"a": 0.5, "b": 0.5},
            }
        )
    )


def test_means_are_over_classes_then_over_the_draws_that_all_inits_share(scores):
    assert scores.classes == (MEAN, "a", "b")
    assert (scores.cases, scores.budgets, scores.draws) == (("easy", "hard"), (1, 2), {1: 1, 2: 2})
    np.testing.assert_allclose(scores.dice_IBKC[0, 1], [[0.65, 0.25], [0.7, 0.2], [0.6, 0.3]])
    assert np.isnan(scores.dice_IBKC[0, 0]).all()


def test_worst_first_and_unscored_last(scores):
    assert scores.ranked(2) == [("hard", pytest.approx(0.375)), ("easy", pytest.approx(0.775))]
    assert [case for case, _ in scores.ranked(1)] == ["easy", "hard"]
    table = worst_cases_html(scores, viewer="curve1-viewer", viewed=["hard"])
    first, second = re.findall(r'data-pane="2 labels" hidden>.*', table)[0].split("</tr>")[1:3]
    assert 'data-viewer="curve1-viewer" data-case="hard" data-budget="2"' in first
    assert ">0.375<" in first
    assert "0.250" in first
    assert "button" not in second
    assert "0.775" in second


def test_data_of_the_scatter_is_strict_json_with_the_first_baseline_across(scores):
    html = scatter_html(scores, baselines=["scratch"], name="s", viewer="curve1-viewer")
    assert '<div class="two-inits" id="s" data-viewer="curve1-viewer">' in html
    tree = json.loads(re.findall(r'<script type="application/json">(.*?)</script>', html)[0])
    assert tree["dice"][1][1][0] == [0.9, 0.5]
    assert tree["dice"][0][0][0] == [None, None]
    assert '<option value="0" selected>scratch</option>' in html.split('data-role="y"')[0]
    assert '<option value="1" selected>mae</option>' in html.split('data-role="y"')[1]
    assert scatter_html(case_scores([]), baselines=[], name="s") == ""


def test_shortcomings_tell_what_is_missing_and_what_is_too_much():
    def row(name, dice, precision, recall):
        return {"class": name, "dice": dice, "precision": precision, "recall": recall}

    ml = {"fine": 5.0, "lost": 2.0, "thin": 4.0, "fat": 10.0, "none": 0.0, "unknown": 0.0}
    rows = [
        row("fine", 0.9, 0.9, 0.9),
        row("thin", 0.4, 1.0, 0.25),
        row("fat", 0.7, 0.5, 0.8),  # 8 ml right, 8 ml wrong
        row("lost", 0.0, 0.0, 0.0),
        row("none", 0.0, 0.0, 0.0),
        row("unknown", math.nan, math.nan, math.nan),
    ]
    assert shortcomings(rows, ml) == [
        "none predicted where the label has none",
        "lost missed (2 ml)",
        "thin 25 % found (4 ml)",
        "fat 8 ml too much (+80 %)",
    ]
    assert shortcomings(rows[2:4], {}) == ["lost missed", "fat too much (+80 %)"]
