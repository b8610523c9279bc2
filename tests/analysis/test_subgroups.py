"""Subgroups: subjects are the unit, gaps are tested as scipy tests them, and nobody is named."""

import numpy as np
import pytest
from scipy import stats

from medseg_ssl.analysis.subgroups import COLUMNS, groups_of, subgroup_rows


def table(scores_of, *, cases_per_subject=1):
    """Group to the scores of its subjects; every subject has as many cases, spread around its score."""
    rows, groups, subjects = [], {}, {}
    for group, scores in scores_of.items():
        for i, score in enumerate(scores):
            for k in range(cases_per_subject):
                case = f"case-{group}-{i}-{k}"
                value = score + 0.01 * (k - (cases_per_subject - 1) / 2)
                rows.append({"case": case, "class": "organ", "dice": value, "nsd": None})
                groups[case], subjects[case] = group, f"person-{group}-{i}"
    return subgroup_rows(rows, by="site", groups=groups, subjects=subjects)


def over(rows, group):
    return next(r for r in rows if r["group"] == group and r["class"] == "mean over classes")


def test_gap_interval_and_tests():
    generator = np.random.default_rng(0)
    scores = {
        "a": generator.normal(0.8, 0.05, 9),
        "b": generator.normal(0.7, 0.05, 7),
        "c": generator.normal(0.8, 0.05, 6),
    }
    rows = table(scores)
    b = over(rows, "b")
    others = np.concatenate([scores["a"], scores["c"]])
    assert b["gap"] == pytest.approx(scores["b"].mean() - others.mean())
    assert b["p"] == pytest.approx(stats.mannwhitneyu(scores["b"], others).pvalue)
    assert b["p_groups"] == pytest.approx(stats.kruskal(*scores.values()).pvalue)
    assert b["p_holm"] == pytest.approx(min(1, 3 * b["p"]))
    low, high = stats.t.interval(0.95, 6, scores["b"].mean(), stats.sem(scores["b"]))
    assert (b["ci_low"], b["ci_high"]) == (pytest.approx(low), pytest.approx(high))
    assert set(b) == set(COLUMNS)
    assert "person" not in str(rows)
    assert "case-" not in str(rows)


def test_many_cases_of_a_subject_are_one_subject():
    scores = {"a": [0.7, 0.8, 0.9, 0.6, 0.75], "b": [0.5, 0.6, 0.4, 0.55, 0.45]}
    one, many = over(table(scores), "a"), over(table(scores, cases_per_subject=4), "a")
    assert (many["subjects"], many["cases"]) == (5, 20)
    assert many["p"] == one["p"]
    assert many["ci_low"] == pytest.approx(one["ci_low"])


def test_people_in_several_groups_are_counted_and_nothing_is_tested():
    """By modality every subject of a CT and MR archive stands in both groups: they are no independent samples."""
    rows, groups, subjects = [], {}, {}
    for i in range(6):
        for group in ("CT", "MR"):
            case = f"{group}{i}"
            rows.append({"case": case, "class": "organ", "dice": 0.5 + 0.05 * i, "nsd": None})
            groups[case], subjects[case] = group, f"p{i if i < 5 else case}"
    found = subgroup_rows(rows, by="modality", groups=groups, subjects=subjects)
    for group in ("CT", "MR"):
        assert over(found, group)["shared"] == 5
        assert all(np.isnan(over(found, group)[name]) for name in ("p", "p_holm", "p_groups"))
    assert over(table({"a": [0.5] * 5, "b": [0.6] * 5}), "a")["shared"] == 0


def test_two_groups_are_one_test():
    two = table({"a": [0.7, 0.8, 0.9, 0.6, 0.75], "b": [0.5, 0.6, 0.4, 0.55, 0.45]})
    assert over(two, "a")["p_holm"] == over(two, "a")["p"] == over(two, "b")["p_holm"]


def test_small_groups_are_flagged_and_not_tested():
    rows = table({"a": [0.7, 0.8, 0.9, 0.6, 0.75], "b": [0.1, 0.2], "c": [0.5, 0.52, 0.54, 0.56, 0.58]})
    assert (over(rows, "b")["small"], over(rows, "a")["small"]) == ("yes", "")
    assert np.isnan(over(rows, "b")["p"])
    assert over(rows, "a")["p"] == pytest.approx(
        stats.mannwhitneyu([0.7, 0.8, 0.9, 0.6, 0.75], [0.5, 0.52, 0.54, 0.56, 0.58]).pvalue
    )
    alone = over(table({"a": [0.5, 0.6]}), "a")
    assert np.isnan(alone["p"])
    assert np.isnan(alone["gap"])


def test_numbers_with_many_values_are_cut_at_terciles():
    found = groups_of({f"c{i}": float(i) for i in range(9)} | {"none": None})
    assert list(found.values()).count(found["c0"]) == 3
    assert found["c8"].startswith("above")
    assert found["none"] == "unknown"
    assert groups_of({"a": 1, "b": 2}) == {"a": "1", "b": "2"}
    assert groups_of({"a": ("thin", "tiny"), "b": ()}) == {"a": "thin tiny", "b": "none"}
