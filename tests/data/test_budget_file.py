"""``budgets.json``: the same cases in every archive of the same data, and a refusal where that cannot be."""

import json

import numpy as np
import pytest

from medseg_ssl.config import ConfigError, UserError
from medseg_ssl.data.budget_file import (
    BudgetFile,
    Budgets,
    case_ids,
    describe,
    fold_splits,
    read_budgets,
    scored_names,
    write_budgets,
)
from medseg_ssl.data.budget_matching import chosen_cases, difference, other_scored, resolve_budgets
from tests.commands import fake_comparison as fakes


def salted(archive, salt):
    """The same data under other keys."""
    cases = {}
    for case, row in archive.cases.items():
        row.case = f"{salt}{case}"
        cases[row.case] = row
    archive.cases = cases
    return archive


def file_of(opened, names, **changes):
    ids = case_ids(opened)
    fields = {
        "archive": opened.fingerprint,
        "split": "default",
        "subset": "test",
        "seed": 0,
        "stratify": None,
        "labels": None,
        "folds": None,
        "cases": [{"draws": {0: {len(names): [ids[name] for name in names]}}}],
    }
    return BudgetFile.model_validate({**fields, **changes})


def test_a_file_names_the_same_cases_under_other_keys(tmp_path):
    path = write_budgets(tmp_path / "budgets.json", file_of(fakes.archive(), ["c3", "c1"]))
    read = read_budgets(path)
    assert read == file_of(fakes.archive(), ["c3", "c1"])
    assert not [name for name in ("c3", "s3", "v3", str(tmp_path)) if f'"{name}' in path.read_text()]
    (fold,) = resolve_budgets(read, salted(fakes.archive(), "other-"))
    assert fold.subsets == {0: {2: ["other-c3", "other-c1"]}}
    cases, access = chosen_cases(read, fakes.archive(), budget=2, draw=0)
    assert cases == ["c3", "c1"]
    assert access.identity() == {}


def test_cases_of_the_same_scans_are_told_apart_by_their_labels():
    archive = fakes.archive(hashes={"s1": "s0"})
    labels = {case: np.full((2, 3, 4), number, np.uint8) for number, case in enumerate(archive.cases)}
    archive.original_label = lambda case: (labels[case], np.eye(4))
    ids = case_ids(archive)
    first, second = sorted(("c0", "c1"), key=lambda case: "." in ids[case])
    assert ids[second] == f"{ids[first]}.1"
    assert len(set(ids.values())) == len(ids)
    labels["c0"], labels["c1"] = labels["c1"], labels["c0"]  # as keys of another salt would order them
    assert case_ids(archive) == {**ids, first: ids[second], second: ids[first]}


def prepared_anew(**changes):
    """The same raw data under another salt, by another recipe: another fingerprint, other keys."""
    other = salted(fakes.archive(**changes), "other-")
    for row in (*other.cases.values(), *other.scans.values()):
        row.subject = f"person-{row.subject}"
    own = other.split()
    lists = {side: tuple(f"person-{s}" for s in getattr(own, side)) for side in ("train", "test")}
    split = own.model_copy(update=lists)
    other.split, other.fingerprint = (lambda name="default": split), "0" * 16
    return other


def drawn(archive, *cases):
    """A file as a comparison writes it."""
    subsets = {0: {len(cases): list(cases)}}
    settings = {
        "split": "default",
        "subset": "test",
        "seed": 0,
        "stratify": None,
        "labels": None,
        "folds": None,
    }
    return describe(archive, [Budgets(archive.split(), subsets, {}, {})], settings=settings)


def test_an_archive_that_was_prepared_anew_may_use_the_file():
    file = drawn(fakes.archive(), "c3", "c1")
    assert BudgetFile.model_validate_json(file.model_dump_json()) == file
    assert difference(file, salted(fakes.archive(), "other-")) == ""
    said = difference(file, prepared_anew())
    assert said == (
        "the budgets were drawn from the archive ffffffffffff…, this one is 000000000000…; all 2 named cases are the "
        "same, of the same subjects and label classes"
    )
    (fold,) = resolve_budgets(file, prepared_anew())
    assert fold.subsets == {0: {2: ["other-c3", "other-c1"]}}


def test_other_test_cases_than_those_of_the_file_are_told():
    theirs = scored_names(fakes.archive(), [["c6", "c7"]])
    file = drawn(fakes.archive(), "c3").model_copy(update={"scored": theirs})
    assert other_scored(file, scored_names(prepared_anew(), [["other-c7", "other-c6"]])) == ""
    said = other_scored(file, scored_names(prepared_anew(), [["other-c7", "other-c8", "other-c9"]]))
    assert "3 are scored here and 2 there, of which 1 are the same" in said
    assert other_scored(drawn(fakes.archive(), "c3"), theirs) == "", "a file of before states none"


def test_an_archive_with_other_cases_subjects_or_classes_may_not():
    file = drawn(fakes.archive(), "c3", "c1", "c2", "c0")
    ids = case_ids(fakes.archive())
    lacks = prepared_anew(hashes={"s3": "other voxels", "s0": "too"})
    missing = ", ".join(sorted((ids["c0"], ids["c3"])))
    with pytest.raises(
        ConfigError, match=rf"name 2 labeled case\(s\) that the archive does not have: {missing}$"
    ):
        resolve_budgets(file, lacks)

    one = prepared_anew()
    one.cases["other-c2"].subject = one.cases["other-c1"].subject
    first = min(ids["c1"], ids["c2"])
    with pytest.raises(
        ConfigError, match=rf"and 2 of 4 named cases differ, the first {first} \(another subject\)"
    ):
        resolve_budgets(file, one)
    together = drawn(one, "other-c1", "other-c2").model_copy(update={"archive": "f" * 16})
    assert together.subjects == (tuple(sorted((ids["c1"], ids["c2"]))),)
    with pytest.raises(ConfigError, match=r"2 of 2 named cases differ, .* \(another subject\)"):
        resolve_budgets(together, prepared_anew())

    stated = prepared_anew()
    stated.cases["other-c1"].known_classes = (True, True, False)
    with pytest.raises(
        ConfigError, match=rf"1 of 4 named cases differ, the first {ids['c1']} \(other classes stated"
    ):
        resolve_budgets(file, stated)
    assert drawn(stated, "other-c1").known_classes == {ids["c1"]: (True, True, False)}

    renamed = prepared_anew()
    renamed.classes = ("background", "organ", "lesion")
    with pytest.raises(
        ConfigError,
        match="label classes differ: background, organ <b>, lesion there, background, organ, lesion here",
    ):
        resolve_budgets(file, renamed)
    with pytest.raises(ConfigError, match="a file of this age states neither subjects nor classes"):
        resolve_budgets(file.model_copy(update={"classes": None}), prepared_anew())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"archive": "0" * 16}, "drawn from the archive 000000000000…, this one is ffffffffffff…"),
        (
            {"cases": [{"draws": {0: {1: ["nobody"]}}}]},
            "name 1 labeled case.s. that the archive does not have",
        ),
        ({"cases": []}, "state folds: None and hold 0"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        resolve_budgets(file_of(fakes.archive(), ["c0"], **change), fakes.archive())


def test_scored_cases_and_missing_draws_are_refused(tmp_path):
    with pytest.raises(
        ConfigError, match="stands in the test list of split 'default' and may not be trained on"
    ):
        resolve_budgets(file_of(fakes.archive(), ["c7"]), fakes.archive())
    file = file_of(fakes.archive(), ["c0", "c1"])
    for options, message in (
        ({"budget": 3, "draw": 0}, "no budget 3 in draw 0; known: 2"),
        ({"budget": 2, "draw": 4}, "no draw 4; known: 0"),
        ({"budget": 2, "draw": 0, "fold": 1}, "no fold 1; known: 0 to 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            chosen_cases(file, fakes.archive(), **options)
    with pytest.raises(UserError, match="cannot read the budgets"):
        read_budgets(tmp_path / "none.json")
    (tmp_path / "other.json").write_text(json.dumps({"format": 1, "archiv": ""}))
    with pytest.raises(ConfigError, match="unknown key 'archiv'"):
        read_budgets(tmp_path / "other.json")


def test_folds_score_every_subject_once_and_leave_the_third_list_out():
    archive = fakes.archive(train=7, test=4)
    own = archive.split()
    development = own.model_copy(update={"train": own.train[:-1], "development": own.train[-1:]})
    archive.split = lambda name="default": development
    folds = fold_splits(archive, split="default", subset="test", folds=3, seed=0)
    scored = [subject for fold in folds for subject in fold.test]
    everybody = {*development.train, *development.test}
    assert sorted(scored) == sorted(everybody)
    for fold in folds:
        assert set(fold.train) == everybody - set(fold.test)
        assert fold.development == development.development
        assert len(fold.test) in (3, 4)
    assert folds == fold_splits(archive, split="default", subset="test", folds=3, seed=0)
    assert folds != fold_splits(archive, split="default", subset="test", folds=3, seed=1)
    assert fold_splits(archive, split="default", subset="test", folds=None, seed=0) == [development]
