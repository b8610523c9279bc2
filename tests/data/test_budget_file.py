"""``budgets.json``: the same cases in every archive of the same data, and a refusal where that cannot be."""

import json

import pytest

from medseg_ssl.config import ConfigError, UserError
from medseg_ssl.data.budget_file import (
    BudgetFile,
    case_ids,
    chosen_cases,
    fold_splits,
    read_budgets,
    resolve_budgets,
    write_budgets,
)
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


def test_cases_of_the_same_scans_are_told_apart():
    archive = fakes.archive(hashes={"s1": "s0"})
    ids = case_ids(archive)
    assert ids["c1"] == f"{ids['c0']}.1"
    assert len(set(ids.values())) == len(ids)


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
