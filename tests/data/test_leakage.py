import pytest

from medseg_ssl.config import ConfigError, UserError, parse
from medseg_ssl.data.archive_writer import ArchiveWriter
from medseg_ssl.data.budgets import write_split
from medseg_ssl.data.leakage import guard, leaks
from medseg_ssl.data.manifest import CaseRow, Split
from medseg_ssl.data.protected import Protected
from tests.data.heads import head, seen
from tests.data.small_archive import RECIPE


def archive(path, rows, *, train=(), development=(), test=()):
    writer = ArchiveWriter.open(path, RECIPE)
    cases = [CaseRow(case=f"c-{r.key}", subject=r.subject, scans=(r.key,), labeled=False) for r in rows]
    split = Split(name="default", seed=0, train=train, development=development, test=test)
    return writer.commit(rows, cases, [], splits=[split])


def kept(other, **lists):
    return parse(Protected, {"archive": other.path, **lists})


def rescaled(key, number, **named):
    """The head of this number in other numbers: other voxels, the same look."""
    return seen(key, head(number) * 3 + 20, **named)


def own(path, *more):
    rows = [seen(f"s{i}", head(i)) for i in range(4)]
    train = ("s0", "s1", *(r.subject for r in more))
    return archive(path, [*rows, *more], train=train, development=("s2",), test=("s3",))


def test_each_training_scan_that_repeats_a_protected_one_is_named_once():
    protected = [seen("p0", head(0), content="P"), seen("p1", head(1))]
    training = [rescaled("t0", 0), rescaled("t1", 1), seen("t2", head(2)), seen("t3", head(5), content="P")]
    training.append(seen("t4", head(0), content="P"))
    found = leaks(training, protected, threshold=0.95)
    assert [(leak.scan, leak.protected, leak.similarity is None) for leak in found] == [
        ("t0", "p0", False),
        ("t1", "p1", False),
        ("t3", "p0", True),
        ("t4", "p0", True),
    ]
    assert str(found[-1]) == "scan t4 has the voxels of p0"
    assert str(found[0]).startswith("scan t0 has the look (similarity 1.000) of p0")


def test_a_clean_archive_states_what_was_checked(tmp_path):
    opened = own(tmp_path / "a")
    other = archive(tmp_path / "b", [seen("x", head(8)), seen("y", head(9))], train=("x",), test=("y",))
    checked = guard(opened, {"s0", "s1"}, protect=[kept(other)])
    common = {"split": "default", "scans": 1, "without_appearance": 0, "similarity": 0.95}
    assert checked == (
        {"archive": opened.fingerprint, "sides": ["test"], "trained_on": ["train"], **common},
        {"archive": other.fingerprint, "sides": ["test", "development"], **common},
    )


def test_a_copy_of_an_own_test_subject_under_another_name_is_refused(tmp_path):
    opened = own(tmp_path / "a", rescaled("again", 3))
    assert len(guard(opened, {"s0", "s1"})) == 1
    with pytest.raises(
        ConfigError,
        match=r"1 scan\(s\) .* under test of its own split 'default': scan again has the look .* of s3",
    ) as caught:
        guard(opened, {"s0", "s1", "again"})
    assert caught.value.code == 2
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("side", ["test", "development"])
def test_what_another_archive_keeps_back_is_refused(tmp_path, side):
    opened = own(tmp_path / "a")
    sides = {"train": ("x",), side: ("y",)}
    other = archive(tmp_path / "b", [rescaled("x", 0), rescaled("y", 1)], **sides)
    with pytest.raises(
        ConfigError, match=r"stand under test or development of split 'default' of .*b: scan s1 has"
    ):
        guard(opened, {"s0", "s1"}, protect=[kept(other)])
    # what the other archive trains on is free
    assert len(guard(opened, {"s0"}, protect=[kept(other)])) == 2


def test_the_split_that_is_scored_is_the_one_that_is_protected(tmp_path):
    """Of two splits of the other archive, one tests a copy of s0, the other a copy of s1."""
    opened = own(tmp_path / "a")
    other = archive(tmp_path / "b", [rescaled("x", 0), rescaled("y", 1)], train=("y",), test=("x",))
    write_split(
        other.path / "splits", Split(name="second", seed=1, train=("x",), development=(), test=("y",))
    )
    for subject, free, name in (("s0", "s1", "default"), ("s1", "s0", "second")):
        with pytest.raises(ConfigError, match=rf"development of split '{name}' of .*b: scan {subject} has"):
            guard(opened, {subject}, protect=[kept(other, split=name)])
        (_, entry) = guard(opened, {free}, protect=[kept(other, split=name)])
        assert (entry["split"], entry["sides"]) == (name, ["test", "development"])
    with pytest.raises(ConfigError, match=r"stand under test or train of split 'second' of .*b: scan s0 has"):
        guard(opened, {"s0"}, protect=[kept(other, split="second", sides=["test", "train"])])
    write_split(
        opened.path / "splits", Split(name="second", seed=1, train=("s0",), development=("s1",), test=("s2",))
    )
    with pytest.raises(ConfigError, match=r"of split 'second' of .*b: scan s1 has"):
        guard(opened, {"s1"}, split="second", protect=[kept(other)])
    (entry,) = guard(opened, {"s0", "s1"}, split="second")
    assert entry["trained_on"] == ["train", "development"]
    with pytest.raises(UserError, match="no split named 'third'; known: default, second"):
        guard(opened, {"s0"}, protect=[kept(other, split="third")])


def test_many_are_counted_and_the_first_named(tmp_path):
    rows = [seen(f"s{i}", head(0), content="same") for i in range(9)]
    opened = archive(tmp_path / "a", rows, train=tuple(f"s{i}" for i in range(8)), test=("s8",))
    with pytest.raises(ConfigError, match=r"8 scan\(s\).* scan s4 has the voxels of s8, and 3 more; leave"):
        guard(opened, {f"s{i}" for i in range(8)})


def test_an_archive_that_protects_nothing_and_one_that_is_none(tmp_path):
    opened = own(tmp_path / "a")
    other = archive(tmp_path / "b", [seen("x", head(8))], train=("x",))
    with pytest.raises(
        ConfigError, match=r"data.protect: split 'default' of .*b has no test or development subject"
    ):
        guard(opened, {"s0"}, protect=[kept(other)])
    with pytest.raises(UserError, match="is not an archive"):
        guard(opened, {"s0"}, protect=[parse(Protected, {"archive": tmp_path / "nowhere"})])


def test_an_older_archive_is_compared_by_voxels_and_that_is_said(tmp_path, caplog):
    opened = own(tmp_path / "a")
    older = rescaled("y", 0).model_copy(update={"appearance": ""})
    other = archive(tmp_path / "b", [older], test=("y",))
    checked = guard(opened, {"s0", "s1"}, protect=[kept(other)])
    assert checked[1]["without_appearance"] == 1
    assert "1 scans have no appearance" in caplog.text
    same = older.model_copy(update={"content_hash": "s0"})
    last = archive(tmp_path / "c", [same], test=("y",))
    with pytest.raises(ConfigError, match="scan s0 has the voxels of y"):
        guard(opened, {"s0"}, protect=[kept(last)])
