"""Several archives, or some modalities of them, as one to pretrain on."""

import numpy as np
import pytest

from medseg_ssl.config import ConfigError
from medseg_ssl.data.archive import Archive
from medseg_ssl.data.intensity import Policy
from medseg_ssl.data.leakage import guard
from medseg_ssl.data.manifest import PairRow, Split
from medseg_ssl.data.mixture import mix
from medseg_ssl.data.sampling import Sampler
from medseg_ssl.types import ViewSpec
from tests.data.small_archive import RECIPE, make_archive, scan_row

SHAPE = (5, 6, 7)
PLAN = {"crop": ViewSpec(count=1, size=(4, 4, 4))}


def archive(path, name, *, fill, modalities=("CT", "MR"), policy=None, spacing=None, test_hash=None):
    """Two subjects to train, one to test, a pair each; every voxel holds ``fill``."""
    rows, pairs = [], []
    for number in range(3):
        subject = f"{name}-s{number}"
        keys = [f"{subject}-{modality}" for modality in modalities]
        for key, modality in zip(keys, modalities, strict=True):
            row = scan_row(key, SHAPE, subject=subject, modality=modality)
            rows.append(
                row.model_copy(update={"content_hash": test_hash} if test_hash and number == 2 else {})
            )
        if len(keys) == 2:
            pairs.append(PairRow(scan_a=keys[0], scan_b=keys[1], relation="registered"))
    made = make_archive(path / name, [(row, np.full(SHAPE, fill)) for row in rows], pairs=pairs)
    made.fingerprint = name * 16
    made.recipe = RECIPE.model_copy(
        update={"spacing_mm": spacing, "intensity": {} if policy is None else {"CT": policy}}
    )
    split = Split(
        name="default", seed=0, train=(f"{name}-s0", f"{name}-s1"), development=(), test=(f"{name}-s2",)
    )
    (path / name / "splits").mkdir()
    (path / name / "splits" / "default.json").write_text(split.model_dump_json())
    return made


def test_a_whole_archive_stays_itself_and_a_part_has_another_fingerprint(tmp_path):
    a = archive(tmp_path, "a", fill=1)
    assert mix([(a, ())]) is a
    assert mix([(a, ("MR", "CT"))]) is a
    part = mix([(a, ("CT",))])
    assert part.fingerprint != a.fingerprint
    assert part.members == (a,)
    assert part.facts().modalities == ("CT",)
    assert {row.modality for row in part.scans.values()} == {"CT"}
    assert part.pairs == [], "a pair of which one scan is left out"
    assert len(Sampler(part, PLAN, seed=0, subjects=part.split().train)) == 2


def test_scans_are_read_from_their_own_archive(tmp_path):
    a, b = archive(tmp_path, "a", fill=1), archive(tmp_path, "b", fill=2, modalities=("MR",))
    both = mix([(a, ("CT",)), (b, ())])
    assert {key: both.read(key, (0, 0, 0), (1, 1, 1)).item() for key in ("a-s0-CT", "b-s1-MR")} == {
        "a-s0-CT": 1,
        "b-s1-MR": 2,
    }
    with pytest.raises(KeyError, match="a-s0-MR"):
        both.read("a-s0-MR", (0, 0, 0), (1, 1, 1))
    assert both.split().train == ("a-s0", "a-s1", "b-s0", "b-s1")
    assert both.facts().modalities == ("CT", "MR")
    assert mix([(b, ()), (a, ("CT",))]).fingerprint == both.fingerprint, "the order does not matter"
    shares = Sampler(both, PLAN, seed=0, subjects=both.split().train).shares
    assert shares == {("CT",): 0.5, ("MR",): 0.5}


def test_spacing_is_stated_where_it_is_one(tmp_path):
    a, b = archive(tmp_path, "a", fill=1, spacing=(3.0, 1.0, 2.0)), archive(tmp_path, "b", fill=1)
    c = archive(tmp_path, "c", fill=1, spacing=(3.0, 1.0, 2.0))
    assert mix([(a, ()), (c, ())]).recipe.spacing_mm == (3.0, 1.0, 2.0)
    assert mix([(a, ()), (b, ())]).recipe.spacing_mm is None


def test_what_cannot_be_mixed_is_refused(tmp_path):
    a = archive(tmp_path, "a", fill=1)
    b = archive(tmp_path, "b", fill=1, policy=Policy(kind="window", hu_range=(0.0, 80.0)))
    with pytest.raises(ConfigError, match="holds no scan of PT; it has CT, MR"):
        mix([(a, ("PT",))])
    with pytest.raises(ConfigError, match="named twice"):
        mix([(a, ("CT",)), (a, ("MR",))])
    with pytest.raises(ConfigError, match="normalise CT differently"):
        mix([(a, ()), (b, ())])
    assert isinstance(mix([(a, ("MR",)), (b, ("CT",))]), Archive), "one policy each"


def test_guard_protects_the_test_subjects_of_every_member(tmp_path):
    a, b = archive(tmp_path, "a", fill=1), archive(tmp_path, "b", fill=1, test_hash="a-s0-CT")
    with pytest.raises(ConfigError, match=r"1 scan\(s\) .* has the voxels of"):
        guard(mix([(a, ("CT",)), (b, ("MR",))]), ["a-s0", "a-s1", "b-s0", "b-s1"])
    clean = archive(tmp_path, "c", fill=1)
    entries = guard(mix([(a, ("CT",)), (clean, ("MR",))]), ["a-s0", "c-s0"])
    assert [entry["archive"] for entry in entries] == [a.fingerprint, clean.fingerprint]
    assert [entry["scans"] for entry in entries] == [2, 2], "all modalities of a test subject"
