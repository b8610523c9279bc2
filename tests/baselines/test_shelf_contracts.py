"""What every baseline on the shelf must do; a new file is picked up by listing."""

import numpy as np
import pytest

from medseg_ssl.baselines import _cases
from medseg_ssl.baselines.base import Baseline
from medseg_ssl.config import UserError, find, parse, shelf
from medseg_ssl.data.archive import Archive
from tests.baselines.bodies import CLASSES, SHAPE, write

BASELINES = shelf("medseg_ssl.baselines")
QUICK = {"fuzzy_cmeans": {"iterations": 10}}
CLASSICAL = {"threshold", "region_growing", "fuzzy_cmeans"}


def build(name, **options):
    cls = find("medseg_ssl.baselines", name, Baseline)
    return cls(parse(cls.Config, {**QUICK.get(name, {}), **options}))


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch):
    """Of registration, where a contract is at stake and not how good it is."""
    monkeypatch.setattr("medseg_ssl.baselines.atlas._STEPS", (4, 4))


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return write(tmp_path_factory.mktemp("bodies"))


@pytest.fixture(scope="module")
def two_channels(tmp_path_factory):
    return write(tmp_path_factory.mktemp("two"), channels=("MR", "CT"))


@pytest.mark.parametrize("name", BASELINES)
def test_one_case_teaches_label_maps_on_the_labels_own_grid(name, archive, monkeypatch):
    baseline = build(name)
    baseline.fit(archive, ["c0"], seed=0)
    refuse_labels(monkeypatch)
    found = dict(baseline.predict_cases(archive, ["c2", "c1"]))
    assert list(found) == ["c2", "c1"]
    for label_DHW in found.values():
        assert label_DHW.dtype == np.uint8
        assert label_DHW.shape == (2 * SHAPE[0], *SHAPE[1:])
        assert set(np.unique(label_DHW)) <= {0, 1, 2}
        assert label_DHW.any()


@pytest.mark.parametrize("name", BASELINES)
def test_fit_reads_the_given_cases_alone_and_repeats_itself(name, archive, monkeypatch):
    read = Archive.read_label
    asked = set()

    def noted(self, case, start, size):
        asked.add(case)
        return read(self, case, start, size)

    monkeypatch.setattr(Archive, "read_label", noted)
    monkeypatch.setattr(Archive, "original_label", refused)
    first, second = build(name), build(name)
    first.fit(archive, ["c0", "c1"], seed=0)
    second.fit(archive, ["c0", "c1"], seed=0)
    assert asked == {"c0", "c1"}
    ((_, a),), ((_, b),) = first.predict_cases(archive, ["c2"]), second.predict_cases(archive, ["c2"])
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", BASELINES)
def test_several_channels(name, two_channels, archive):
    baseline = build(name)
    baseline.fit(two_channels, ["c0", "c1"], seed=0)
    assert dict(baseline.predict_cases(two_channels, ["c2"]))["c2"].any()
    if name not in {"size_only", "position_prior"}:  # no voxel is read there, so no channel either
        with pytest.raises(UserError, match=r"case c2 has 1 channel\(s\), the training cases have 2"):
            list(baseline.predict_cases(archive, ["c2"]))


@pytest.mark.parametrize("name", BASELINES)
def test_a_class_that_no_case_states_is_never_predicted(name, tmp_path):
    archive = write(tmp_path, known=(True, True, False), shifts=((0, 0, 0), (0, 1, 0)))
    baseline = build(name)
    baseline.fit(archive, ["c0"], seed=0)
    assert set(np.unique(dict(baseline.predict_cases(archive, ["c1"]))["c1"])) == {0, 1}


@pytest.mark.parametrize("name", BASELINES)
def test_unlabeled_slices_are_no_class(name, tmp_path):
    archive = write(tmp_path, unlabeled=(0, 4, 7, 8), shifts=((0, 0, 0), (0, 1, 0)))
    baseline = build(name)
    baseline.fit(archive, ["c0"], seed=0)
    found = dict(baseline.predict_cases(archive, ["c1"]))["c1"]
    assert set(np.unique(found)) <= {0, 1, 2}
    assert found.any()


@pytest.mark.parametrize("name", BASELINES)
def test_what_cannot_be_learned_from_is_refused(name, archive):
    with pytest.raises(UserError, match="at least 1 labeled training case"):
        build(name).fit(archive, [], seed=0)
    with pytest.raises(UserError, match=r"no label in the archive for 1 case\(s\), the first is nobody"):
        build(name).fit(archive, ["c0", "nobody"], seed=0)


@pytest.mark.parametrize("name", sorted(CLASSICAL))
def test_a_missing_library_is_named(name, archive, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(UserError, match=r"pip install 'medseg-ssl\[classical\]'"):
        build(name).fit(archive, ["c0"], seed=0)


def refused(*_, **__):
    raise AssertionError("a label was read")


def refuse_labels(monkeypatch):
    monkeypatch.setattr(Archive, "read_label", refused)
    monkeypatch.setattr(Archive, "original_label", refused)


def test_each_kind_of_channels_learns_apart(tmp_path):
    """An archive whose cases are a CT or an MR each."""
    mixed = write(tmp_path / "mr")
    other = write(tmp_path / "ct", channels=("CT",))
    kinds = _cases.Channels(mixed, ["c0", "c1"], lambda cases: tuple(cases))
    assert kinds.of(mixed, "c2") == ("c0", "c1")
    assert kinds.of(other, "c2") == ("c0", "c1")  # a kind that nobody labeled: everything there is
    merged = Archive(
        tmp_path,
        mixed.recipe,
        fingerprint="1" * 64,
        generation=1,
        classes=CLASSES,
        scans=[*mixed.scans.values(), *other.scans.values()],
        cases=[
            *mixed.cases.values(),
            *(row.model_copy(update={"case": f"ct-{row.case}"}) for row in other.cases.values()),
        ],
        pairs=[],
    )
    kinds = _cases.Channels(merged, ["c0", "ct-c0", "ct-c1"], lambda cases: tuple(cases))
    assert kinds.of(merged, "c2") == ("c0",)
    assert kinds.of(merged, "ct-c2") == ("ct-c0", "ct-c1")
