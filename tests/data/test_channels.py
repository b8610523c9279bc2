"""Cases of several channels from single scans: who is joined, who is left out, and what a crop then holds."""

import pickle

import numpy as np
import pytest

from medseg_ssl.config import UserError
from medseg_ssl.data.channels import cases_of
from medseg_ssl.data.loader import Loader
from medseg_ssl.data.manifest import CaseRow, PairRow
from medseg_ssl.data.partial import Access, PartialLabel
from medseg_ssl.types import ViewSpec

from .small_archive import make_archive, scan_row

SHAPE, SPACING = (12, 10, 14), (3.0, 1.0, 2.0)
SLOPE, START = (4.0, 3.0, 2.0), -100.0
"""HU per mm along x, y, z, and HU at the origin."""


def rows_of(**scans):
    """Key to a scan row: a name such as ``a_PT`` is subject a's PT scan."""
    found = {}
    for name, options in scans.items():
        subject, modality = name.split("_")[:2]
        found[name] = scan_row(name, SHAPE, subject=subject, modality=modality, **options)
    return found


def single(*keys, labeled=True):
    return {
        f"c-{key}": CaseRow(case=f"c-{key}", subject=key[0], scans=(key,), labeled=labeled) for key in keys
    }


def pair(a, b, relation="registered", **options):
    return PairRow(scan_a=a, scan_b=b, relation=relation, **options)


def test_scans_in_one_place_are_joined_in_the_order_of_channels():
    scans = rows_of(a_PT={}, a_CT={}, a_MR={}, b_PT={}, b_CT={})
    pairs = [pair("a_CT", "a_PT"), pair("a_MR", "a_PT", "same_frame"), pair("b_PT", "b_CT")]
    cases = single(*scans) | single("b_PT", labeled=False)
    both = cases_of(cases, scans, pairs, ("PT", "CT"))
    assert {name: row.scans for name, row in both.items()} == {
        "c-a_PT": ("a_PT", "a_CT"),
        "c-b_PT": ("b_PT", "b_CT"),
    }
    assert [row.labeled for row in both.values()] == [True, False], (
        "the pool of unlabeled cases is joined too"
    )
    three = cases_of(cases, scans, pairs, ("PT", "MR", "CT"))
    assert {name: row.scans for name, row in three.items()} == {"c-a_PT": ("a_PT", "a_MR", "a_CT")}
    whole = {"w": CaseRow(case="w", subject="a", scans=("a_PT", "a_CT"), labeled=True)}
    assert cases_of(cases | whole, scans, pairs, ("PT", "CT")) == whole, "what is prepared so is taken so"


@pytest.mark.parametrize(
    "pairs",
    [
        [],
        [pair("a_CT", "a_PT", "same_subject")],
        [pair("a_CT", "a_PT", "same_frame", transform_44=tuple(map(tuple, np.eye(4).tolist())))],
        [pair("a_CT", "a_PT"), pair("a_PT", "a_CT_2")],
    ],
    ids=["no pair", "another place", "moved", "two of them"],
)
def test_what_cannot_be_joined_is_left_out(pairs):
    scans = rows_of(a_PT={}, a_CT={}, a_CT_2={})
    assert cases_of(single(*scans), scans, pairs, ("PT", "CT")) == {}


def archive_of(path):
    """PET with a label, and CT of half the voxel size whose HU are linear in space."""
    first = scan_row("a_PT", SHAPE, modality="PT", spacing_mm=SPACING)
    affine = np.array(first.affine_44)
    fine = affine.copy()
    fine[:3, :3] /= 2
    fine[:3, 3] += affine[:3, :3] @ np.full(3, -0.25)
    size = tuple(2 * n for n in SHAPE)
    second = scan_row("a_CT", size, modality="CT", affine_44=fine, spacing_mm=np.divide(SPACING, 2))
    index = np.stack([*np.indices(size), np.ones(size)]).reshape(4, -1)
    hu = np.round(hounsfield((fine @ index)[:3])).reshape(size)
    label = np.zeros(SHAPE, np.uint8)
    label[3:9, 2:7, 4:11] = 1
    pet = np.random.default_rng(0).integers(50, 200, SHAPE)
    case = CaseRow(case="c", subject="s0", scans=("a_PT",), labeled=True)
    other = CaseRow(case="d", subject="s0", scans=("a_CT",), labeled=False)
    archive = make_archive(
        path, [(first, pet), (second, hu)], cases=[(case, label)], classes=("background", "tumour")
    )
    archive.pairs = [pair("a_CT", "a_PT")]
    archive.cases["d"] = other
    return archive, label


def hounsfield(place_3N):
    return START + np.tensordot(SLOPE, place_3N, axes=1)


def test_crops_of_a_joined_case_hold_every_channel_at_its_place(tmp_path):
    archive, label = archive_of(tmp_path)
    seen = pickle.loads(pickle.dumps(archive.limited(Access(channels=("PT", "CT")))))
    assert list(seen.cases) == ["c"]
    assert seen.facts().channels == 2
    assert (archive.facts().channels, set(archive.cases)) == (1, {"c", "d"}), "the archive stays what it is"
    np.testing.assert_array_equal(seen.original_label("c")[0], label)
    spec = ViewSpec(count=1, size=(6, 8, 10), augment="none", labeled=True)
    (batch,) = Loader(seen, {"labeled": spec}, batch_size=1, steps=1, seed=0, subjects=["s0"])
    view = batch.views["labeled"][0]
    index = np.stack([*np.indices(spec.size), np.ones(spec.size)]).reshape(4, -1)
    expected = seen.linear("a_CT").apply(hounsfield((view.affine_B44[0].numpy() @ index)[:3]))
    valid = view.valid_BDHW[0].numpy().reshape(-1)
    assert valid.mean() > 0.5
    ct = view.image_BCDHW[0, 1].numpy().reshape(-1)
    tolerance = 1.5 * abs(float(np.diff(seen.linear("a_CT").apply(np.array([0.0, 1.0])))[0]))  # HU are whole
    np.testing.assert_allclose(ct[valid], expected[valid], atol=tolerance)
    assert np.ptp(expected[valid]) > 10 * tolerance


def test_channels_are_part_of_what_a_run_was_fed_and_go_with_partial_labels(tmp_path):
    archive, _ = archive_of(tmp_path)
    assert Access(channels=("PT", "CT")).identity() != Access(channels=("PT", "MR")).identity()
    assert Access().identity() == {}
    part = Access(channels=("PT", "CT"), labels={"c": PartialLabel(classes=())})
    limited = archive.limited(part)
    assert limited.cases["c"].scans == ("a_PT", "a_CT")
    assert limited.cases["c"].known_classes == (True, False)
    with pytest.raises(UserError, match=r"no labeled case of PT\+MR, and no labeled PT scan to join"):
        archive.limited(Access(channels=("PT", "MR")))
