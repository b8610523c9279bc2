"""Changes paired by case, with the subject as the unit: copies of a case are no evidence."""

import numpy as np
import pytest
from scipy import stats

from medseg_ssl.analysis.change import OVER_CLASSES, paired_change

WAS, NOW = (0.80, 0.70, 0.90, 0.60), (0.70, 0.65, 0.60, 0.58)


def rows(scores, copies=1):
    return [
        {"case": f"c{n}.{copy}", "class": name, "dice": value + change}
        for n, value in enumerate(scores)
        for copy in range(copies)
        for name, change in (("organ", 0.01), ("lesion", -0.01))
    ]


def change(copies, was=WAS, now=NOW):
    subjects = {f"c{n}.{copy}": f"s{n}" for n in range(len(was)) for copy in range(copies)}
    found = paired_change(
        rows(was, copies), rows(now, copies), name=OVER_CLASSES, metric="dice", subjects=subjects
    )
    assert found is not None
    return found


def test_copies_of_a_subjects_case_do_not_narrow_the_interval():
    one, three = change(1), change(3)
    assert (one["subjects"], one["cases"], three["subjects"], three["cases"]) == (4, 4, 4, 12)
    for key in ("before", "after", "difference", "ci_low", "ci_high", "p"):
        assert three[key] == pytest.approx(one[key]), key
    expected = stats.ttest_rel(NOW, WAS)
    low, high = expected.confidence_interval()
    assert (one["ci_low"], one["ci_high"], one["p"]) == pytest.approx((low, high, expected.pvalue))


def test_every_subject_counts_once_however_many_cases_it_has():
    was = [{"case": f"c{n}", "class": "organ", "dice": v} for n, v in enumerate((0.9, 0.5, 0.5, 0.5))]
    now = [{"case": f"c{n}", "class": "organ", "dice": v} for n, v in enumerate((0.9, 0.2, 0.4, 0.6))]
    now.append({"case": "c4", "class": "organ", "dice": 0.0})  # without a score before it enters nothing
    subjects = {"c0": "a", "c1": "b", "c2": "b", "c3": "b", "c4": "a"}
    found = paired_change(was, now, name="organ", metric="dice", subjects=subjects)
    assert found is not None
    assert (found["subjects"], found["cases"]) == (2, 4)
    assert found["difference"] == pytest.approx((0.0 + np.mean([-0.3, -0.1, 0.1])) / 2)
    assert (found["before"], found["after"]) == pytest.approx((0.7, 0.65))


def test_a_class_that_is_scored_on_one_side_alone_is_counted():
    """A false lesion in a healthy case: absent before (no score), wrong after (0); no mean can hold that."""
    was, now = rows(WAS), rows(NOW)
    was[1]["dice"] = None
    found = paired_change(
        was, now, name="lesion", metric="dice", subjects={f"c{n}.0": f"s{n}" for n in range(4)}
    )
    assert (found["cases"], found["one_sided"]) == (3, 1)
    found = paired_change(
        was, now, name=OVER_CLASSES, metric="dice", subjects={f"c{n}.0": f"s{n}" for n in range(4)}
    )
    assert (found["cases"], found["one_sided"]) == (4, 1), "its other class has a score on both sides"
    assert change(1)["one_sided"] == 0
