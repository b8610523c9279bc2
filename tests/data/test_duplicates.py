from typing import Literal

import numpy as np

from medseg_ssl.data.duplicates import find_copies, notes
from medseg_ssl.data.manifest import CaseRow
from tests.data.heads import head, seen


def case(*rows, labeled=False):
    key = f"case-{rows[0].key}"
    return CaseRow(case=key, subject=rows[0].subject, scans=tuple(r.key for r in rows), labeled=labeled)


def copies_of(rows, cases=None, drop: bool | Literal["near"] = False, threshold=0.95):
    cases = [case(r) for r in rows] if cases is None else cases
    return find_copies(rows, cases, drop=drop, threshold=threshold)


def flags(found):
    return {row.key: row.quality for row in found.scans if row.quality}


def three():
    """A scan, its twin with the same voxels, its near copy of another subject, and a stranger."""
    noisy = head(0) + np.random.default_rng(1).normal(0, 3, head(0).shape)
    return [
        seen("a", head(0), subject="one", content="A"),
        seen("b", head(0), subject="one", content="A"),
        seen("c", noisy.astype(np.float32), subject="two", content="C"),
        seen("d", head(9), subject="three", content="D"),
    ]


def test_copies_are_flagged_and_dropped_only_where_the_recipe_says_so():
    rows = three()
    found = copies_of(rows)
    assert flags(found) == {"b": ("duplicate",), "c": ("near_duplicate",)}
    assert found.dropped == []
    exact = copies_of(rows, drop=True)
    assert (flags(exact), exact.dropped) == ({"c": ("near_duplicate",)}, [(rows[1], "same voxels as scan a")])
    near = copies_of(rows, drop="near")
    assert flags(near) == {}
    assert [r.key for r in near.scans] == ["a", "d"]
    assert [c.case for c in near.cases] == ["case-a", "case-d"]
    [_, (row, reason)] = near.dropped
    assert row.key == "c"
    assert reason.startswith("near copy of scan a: similarity ")
    assert reason.endswith("(near_duplicate: 0.95)")
    # found even where the copy went
    assert {(t.scan_a.subject, t.scan_b.subject) for t in near.twins} == {("one", "two")}


def test_only_keys_tell_of_one_subject_under_two_names():
    lines = notes(copies_of(three()))
    assert lines[:2] == [
        "1 scans have the same voxels as another (flag duplicate)",
        "1 scans look like another (flag near_duplicate)",
    ]
    assert lines[2].startswith("maybe one subject under two names: one and two (scans a and c, similarity ")
    assert notes(copies_of(three()[2:])) == []


def test_a_labeled_scan_and_a_channel_stay():
    rows = three()
    labeled = copies_of(rows, [case(rows[2], labeled=True), case(rows[0])], drop="near")
    assert [row.key for row, _ in labeled.dropped] == ["a", "b"]
    joined = copies_of(rows, [case(rows[0]), case(rows[2], rows[3])], drop="near")
    assert [row.key for row, _ in joined.dropped] == ["b"]
    assert flags(joined) == {"c": ("near_duplicate",)}


def test_two_contrasts_of_one_subject_are_no_copies():
    rows = [
        seen("t1", head(0), subject="s", contrast="T1w"),
        seen("t1c", head(0) * 2, subject="s", contrast="T1c"),
    ]
    found = copies_of(rows)
    assert (flags(found), found.twins) == ({}, [])
    other = [rows[0], rows[1].model_copy(update={"subject": "t"})]
    assert flags(copies_of(other)) == {"t1c": ("near_duplicate",)}


def test_a_flag_that_holds_no_more_goes():
    rows = [
        row.model_copy(update={"quality": ("thin", "duplicate", "near_duplicate")}) for row in three()[3:]
    ]
    assert flags(copies_of(rows)) == {"d": ("thin",)}


def test_what_is_in_the_archive_is_the_original():
    """A scan of the second generation goes before one of this run, whose row has no generation yet."""
    rows = [row.model_copy(update={"generation": g}) for row, g in zip(three()[:2], (2, 1), strict=True)]
    found = find_copies(rows, [], drop=True, threshold=0.95, earlier={"a"})
    assert [row.key for row in found.scans] == ["a"]
    # without dropping, a second run in another order calls the same one the copy
    first = copies_of(three()[:2]).scans
    again = find_copies(first[::-1], [], drop=False, threshold=0.95, earlier={"a", "b"})
    assert flags(again) == {"b": ("duplicate",)}
