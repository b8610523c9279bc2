import hashlib
import json
from itertools import pairwise

import pytest

from medseg_ssl.config import ConfigError, UserError
from medseg_ssl.data.budgets import (
    check_split,
    make_folds,
    make_split,
    nested_budgets,
    read_split,
    write_split,
)
from medseg_ssl.data.manifest import Split


def hashes(count=20):
    return {f"s{i}": hashlib.sha256(str(i).encode()).hexdigest() for i in range(count)}


def test_split_follows_the_stated_order():
    subjects = hashes()
    split = make_split(subjects, seed=3, test=4, development=2)
    order = sorted(subjects, key=lambda s: hashlib.sha256(f"3:{subjects[s]}".encode()).hexdigest())
    assert split.test == tuple(order[:4])
    assert split.development == tuple(order[4:6])
    assert split.train == tuple(order[6:])
    assert make_split(subjects, seed=4, test=4, development=2).test != split.test


def test_split_does_not_depend_on_names_or_order():
    subjects = hashes()
    split = make_split(subjects, seed=0, test=0.2, development=0.1)
    renamed = {f"other{hash(s)}": h for s, h in reversed(subjects.items())}
    other = make_split(renamed, seed=0, test=0.2, development=0.1)
    assert [subjects[s] for s in split.test] == [renamed[s] for s in other.test]
    assert [subjects[s] for s in split.train] == [renamed[s] for s in other.train]
    assert (len(split.test), len(split.development)) == (4, 2)


def test_subjects_sharing_a_scan_stay_together():
    subjects = {s: [h] for s, h in hashes(12).items()}
    subjects["s1"].append(subjects["s7"][0])
    subjects["s9"].append(subjects["s7"][0])
    for seed in range(20):
        split = make_split(subjects, seed=seed, test=3, development=3)
        sides = [{"s1", "s7", "s9"} & set(side) for side in (split.train, split.development, split.test)]
        assert sorted(map(len, sides)) == [0, 0, 3]
        check_split(split, known=subjects)


def test_reserved_subjects_go_to_test_on_top():
    split = make_split(hashes(), seed=0, test=3, development=0, reserved_test={"s5", "s6"})
    assert {"s5", "s6"} <= set(split.test)
    assert len(split.test) == 5


@pytest.mark.parametrize(("test", "development"), [(20, 0), (10, 10), (1.0, 0), (-1, 0), (0.6, 0.6)])
def test_impossible_splits(test, development):
    with pytest.raises(ConfigError, match=r"split\."):
        make_split(hashes(), seed=0, test=test, development=development)


def test_small_shares_still_take_someone():
    split = make_split(hashes(3), seed=0, test=0.2, development=0.1)
    assert tuple(map(len, (split.test, split.development, split.train))) == (1, 1, 1)
    assert make_split({}, seed=0, test=0.2, development=0.1).train == ()


def test_files_round_trip(tmp_path):
    split = make_split(hashes(), seed=0, test=4, development=2, name="mine")
    path = write_split(tmp_path / "splits", split)
    assert path.name == "mine.json"
    assert read_split(path, known=hashes()) == split
    assert [p.name for p in path.parent.iterdir()] == ["mine.json"]


def test_one_subject_in_two_splits_is_refused(tmp_path):
    tree = dict(name="bad", seed=0, train=["a", "b"], development=[], test=["c", "a"])
    file = tmp_path / "bad.json"
    file.write_text(json.dumps(tree))
    with pytest.raises(UserError, match=r"bad\.json: subject a stands in train and in test"):
        read_split(file)
    with pytest.raises(UserError, match="twice in train"):
        check_split(Split(name="x", seed=0, train=("a", "a"), development=(), test=()))
    with pytest.raises(UserError, match="in train and in test"):
        write_split(tmp_path, Split(**tree))
    tree["test"] = ["c"]
    file.write_text(json.dumps(tree))
    with pytest.raises(UserError, match="subject c of test is not in the archive"):
        read_split(file, known={"a", "b"})


def test_broken_split_files(tmp_path):
    (tmp_path / "default.json").write_text("{")
    with pytest.raises(UserError, match="no valid split"):
        read_split(tmp_path / "default.json")
    with pytest.raises(UserError, match="no split named 'fold1'; known: default"):
        read_split(tmp_path / "fold1.json")


def test_budgets_are_nested_seeded_and_differ_between_draws():
    cases = {f"s{i}": [f"c{i}"] for i in range(30)}
    budgets = (1, 2, 4, 8, 16)
    chosen = nested_budgets(cases, budgets, seed=0, draw=0)
    for small, large in pairwise(budgets):
        assert chosen[large][:small] == chosen[small]
        assert len(set(chosen[large])) == large
    assert chosen == nested_budgets(cases, budgets[::-1], seed=0, draw=0)
    draws = {tuple(nested_budgets(cases, [4], seed=0, draw=d)[4]) for d in range(10)}
    assert len(draws) == 10
    assert chosen != nested_budgets(cases, budgets, seed=1, draw=0)


def test_cases_of_a_subject_come_together():
    cases = {"a": ["a1", "a2", "a3"], "b": ["b1"], "c": ["c1", "c2"]}
    for draw in range(10):
        everything = nested_budgets(cases, [6], seed=0, draw=draw)[6]
        subjects = [case[0] for case in everything]
        assert len([i for i in range(1, 6) if subjects[i] != subjects[i - 1]]) == 2


def test_strata_take_turns():
    cases = {f"s{i}": [f"c{i}"] for i in range(12)}
    stratum = {s: "rare" if i < 3 else "common" for i, s in enumerate(cases)}
    for draw in range(10):
        four = nested_budgets(cases, [4], seed=0, draw=draw, stratify=stratum)[4]
        assert sum(stratum["s" + case[1:]] == "rare" for case in four) == 2


@pytest.mark.parametrize("budget", [0, 31])
def test_impossible_budget(budget):
    with pytest.raises(ConfigError, match=f"budget {budget} is impossible: there are 30 labeled"):
        nested_budgets({f"s{i}": [f"c{i}"] for i in range(30)}, [budget], seed=0, draw=0)


def test_rare_classes_stand_in_the_smallest_budgets():
    cases = {f"s{i}": [f"c{i}"] for i in range(40)}
    shows = {f"s{i}": {"liver"} | ({"tumour"} if i in (5, 31) else set()) for i in range(40)}
    shows["s7"] = {"cyst"}
    firsts = set()
    for draw in range(10):
        chosen = nested_budgets(cases, [2, 4, 40], seed=0, draw=draw, cover=shows)
        seen = [shows[f"s{case[1:]}"] for case in chosen[2]]
        assert set().union(*seen) == {"liver", "tumour", "cyst"}
        assert chosen[4][:2] == chosen[2]
        assert sorted(chosen[40]) == sorted(c for of in cases.values() for c in of)
        firsts.add(tuple(chosen[4]))
    assert len(firsts) > 5, "still drawn"
    free = nested_budgets(cases, [40], seed=0, draw=0)
    assert nested_budgets(cases, [40], seed=0, draw=0, cover={}) == free
    assert nested_budgets(cases, [40], seed=0, draw=0, cover={s: {"liver"} for s in cases}) == free


def test_folds_keep_copies_together_and_share_out_the_labels():
    subjects = {name: [content] for name, content in hashes(17).items()}
    subjects["copy"] = subjects["s3"]
    labeled = {f"s{i}" for i in range(6)}
    folds = make_folds(subjects, folds=3, seed=0, labeled=labeled)
    assert sorted(s for fold in folds for s in fold) == sorted(subjects)
    assert sorted(map(len, folds)) == [6, 6, 6]
    assert all(len(labeled & set(fold)) in (1, 2, 3) for fold in folds)
    assert any({"s3", "copy"} <= set(fold) for fold in folds)
    renamed = {f"x{name}": contents for name, contents in reversed(subjects.items())}
    others = make_folds(renamed, folds=3, seed=0, labeled={f"x{s}" for s in labeled})
    content = [sorted(subjects[s][0] for s in fold) for fold in folds]
    assert [sorted(renamed[s][0] for s in fold) for fold in others] == content
    for count in (1, 7):
        with pytest.raises(ConfigError, match=f"number of labeled subjects, 6, got {count}"):
            make_folds(subjects, folds=count, seed=0, labeled=labeled)


def test_folds_share_out_every_stratum_rare_ones_first():
    subjects = {name: [content] for name, content in hashes(23).items()}
    subjects["copy"] = subjects["s3"]
    labeled = {f"s{i}" for i in range(20)} | {"copy"}
    shows = {s: {"liver"} for s in labeled}
    for rare in ("s0", "s5", "s11", "s3"):
        shows[rare] = {"liver", "tumour"}
    shows["s19"] = set()
    folds = make_folds(subjects, folds=4, seed=0, labeled=labeled, strata=shows)
    assert sorted(s for fold in folds for s in fold) == sorted(subjects)
    assert [sum("tumour" in shows.get(s, ()) for s in fold) for fold in folds] == [1, 1, 1, 1]
    assert sorted(map(len, folds)) == [6, 6, 6, 6]
    assert all(len(labeled & set(fold)) in (5, 6) for fold in folds)
    assert any({"s3", "copy"} <= set(fold) for fold in folds)
    renamed = {f"x{name}": contents for name, contents in reversed(subjects.items())}
    strata = {f"x{s}": names for s, names in shows.items()}
    others = make_folds(renamed, folds=4, seed=0, labeled={f"x{s}" for s in labeled}, strata=strata)
    content = [sorted(subjects[s][0] for s in fold) for fold in folds]
    assert [sorted(renamed[s][0] for s in fold) for fold in others] == content, (
        "names and their order decide nothing"
    )
    free = [make_folds(subjects, folds=4, seed=seed, labeled=labeled) for seed in range(10)]
    assert any({sum("tumour" in shows.get(s, ()) for s in f) for f in found} != {1} for found in free)


def test_folds_share_out_the_values_of_a_column():
    subjects = {name: [content] for name, content in hashes(17).items()}
    column = {s: {"T1w" if int(s[1:]) < 5 else "T2w" if int(s[1:]) < 11 else "FLAIR"} for s in subjects}
    for seed in range(5):
        folds = make_folds(subjects, folds=3, seed=seed, labeled=set(subjects), strata=column)
        assert sorted(map(len, folds)) == [5, 6, 6]
        for value in ("T1w", "T2w", "FLAIR"):
            counts = [sum(column[s] == {value} for s in fold) for fold in folds]
            assert max(counts) - min(counts) <= 1, value
