import pickle
from collections import Counter

import numpy as np
import pytest

from medseg_ssl.config import ConfigError, UserError
from medseg_ssl.data.crops import check_plan
from medseg_ssl.data.manifest import CaseRow, PairRow
from medseg_ssl.data.sampling import Sampler
from medseg_ssl.types import ViewSpec
from tests.data.small_archive import make_archive, scan_row

SINGLE = {"crop": ViewSpec(count=1, size=(4, 4, 4))}
PAIRED = {"pair": ViewSpec(count=2, size=(4, 4, 4), pair="same_box")}
LABELED = {"crop": ViewSpec(count=1, size=(4, 4, 4), labeled=True)}


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    volume = np.zeros((4, 4, 4))
    scans = [(scan_row(f"ct{i}", (4, 4, 4), subject=f"s{i}", modality="CT"), volume) for i in range(16)]
    scans += [(scan_row(f"pt{i}", (4, 4, 4), subject=f"s{i}", modality="PT"), volume) for i in range(4)]
    cases = [
        (CaseRow(case=f"c{i}", subject=f"s{i}", scans=(f"ct{i}", f"pt{i}"), labeled=i < 3), volume)
        for i in range(4)
    ]
    pairs = [
        PairRow(scan_a=f"ct{i}", scan_b=f"pt{i}", relation="registered" if i < 2 else "same_study")
        for i in range(4)
    ]
    path = tmp_path_factory.mktemp("archive")
    return make_archive(path, scans, cases=cases, pairs=pairs, classes=("background", "organ"))


def test_a_sample_depends_on_nothing_but_its_index(archive):
    one, other = (Sampler(archive, SINGLE, seed=3) for _ in range(2))
    forward = [one.sample(i) for i in range(100)]
    backward = [other.sample(i) for i in reversed(range(100))][::-1]
    assert forward == backward
    assert pickle.loads(pickle.dumps(one)).sample(77) == forward[77]
    assert forward != [Sampler(archive, SINGLE, seed=4).sample(i) for i in range(100)]


@pytest.mark.parametrize(("temperature", "share"), [(1.0, 0.2), (0.5, 1 / 3), (0.0, 0.5)])
def test_modalities_are_balanced_by_temperature(archive, temperature, share):
    sampler = Sampler(archive, SINGLE, seed=0, modality_temperature=temperature)
    drawn = Counter(sampler.sample(i).scans[0][:2] for i in range(4000))
    assert drawn["pt"] / 4000 == pytest.approx(share, abs=0.01)
    assert sampler.shares[("PT",)] == pytest.approx(share)


def test_a_round_covers_every_scan_once_at_temperature_one(archive):
    sampler = Sampler(archive, SINGLE, seed=0, modality_temperature=1.0)
    for number in range(5):
        drawn = [sampler.sample(number * 20 + i).scans for i in range(20)]
        # the share of a modality may be rounded up by one in a round
        assert len(set(drawn)) >= 19


def test_pairs_of_accepted_relations_only(archive):
    sampler = Sampler(archive, PAIRED, seed=0, relations=("registered",))
    drawn = {sampler.sample(i) for i in range(20)}
    assert {(s.scans, s.relation) for s in drawn} == {
        (("ct0", "pt0"), "registered"),
        (("ct1", "pt1"), "registered"),
    }
    assert len(Sampler(archive, PAIRED, seed=0)) == 4
    with pytest.raises(UserError, match=r"takes same_frame; the archive has registered, same_study"):
        Sampler(archive, PAIRED, seed=0, relations=("same_frame",))
    with pytest.raises(ConfigError, match="no relation named 'friends'"):
        Sampler(archive, PAIRED, seed=0, relations=("friends",))


def test_labeled_plans_draw_labeled_cases_with_all_their_channels(archive):
    sampler = Sampler(archive, LABELED, seed=0)
    assert {sampler.sample(i).case for i in range(30)} == {"c0", "c1", "c2"}
    assert sampler.sample(0).scans[0].startswith("ct")
    assert len(sampler.sample(0).scans) == 2
    assert {Sampler(archive, LABELED, seed=0, cases=["c1"]).sample(i).case for i in range(9)} == {"c1"}


def test_subjects_limit_every_kind_of_draw(archive):
    for plan in (SINGLE, PAIRED, LABELED):
        sampler = Sampler(archive, plan, seed=0, subjects=["s0", "s2"])
        assert {sampler.sample(i).subject for i in range(30)} == {"s0", "s2"}


def test_what_is_not_there_is_named(archive):
    with pytest.raises(UserError, match="no subject 'nobody'"):
        Sampler(archive, SINGLE, seed=0, subjects=["s0", "nobody"])
    with pytest.raises(UserError, match="no labeled case 'c3'"):
        Sampler(archive, LABELED, seed=0, cases=["c3"])
    with pytest.raises(UserError, match="no scan to draw from"):
        Sampler(archive, SINGLE, seed=0, subjects=[])
    with pytest.raises(ConfigError, match="modality_temperature"):
        Sampler(archive, SINGLE, seed=0, modality_temperature=2)


def test_the_pool_holds_every_case_like_the_labeled_ones_and_names_none(archive):
    plan = {**LABELED, "other": ViewSpec(count=1, size=(4, 4, 4), pool="all")}
    drawn = Sampler(archive, plan, seed=0, subjects=["s0", "s1", "s3", "s9"], cases=["c1"])
    pool = drawn.pool()
    assert {pool.sample(i).scans for i in range(30)} == {(f"ct{i}", f"pt{i}") for i in (0, 1, 3)}
    assert {pool.sample(i).case for i in range(30)} == {None}
    with pytest.raises(ConfigError, match="needs the subjects"):
        Sampler(archive, plan, seed=0, cases=["c1"]).pool()
    wrong = {"crop": ViewSpec(count=1, size=(4, 4, 4), pool="all")}
    with pytest.raises(ConfigError, match="needs a labeled view beside it"):
        check_plan(wrong, [])
    with pytest.raises(ConfigError, match="neither labeled nor paired"):
        check_plan({"crop": ViewSpec(count=1, size=(4, 4, 4), pool="all", labeled=True)}, [])
