import numpy as np
import pytest

from medseg_ssl.data.manifest import ScanRow, Statistics
from medseg_ssl.data.pairing import derive_pairs, derive_relation

STATISTICS = Statistics(
    minimum=0,
    maximum=1,
    mean=0,
    std=1,
    p005=0,
    median=0,
    p995=1,
    foreground_threshold=0,
    foreground_fraction=1,
)


def scan(key, *, subject="s", study="d1", frame="", shape=(4, 4, 4), origin=0.0):
    affine = np.eye(4)[:, [2, 1, 0, 3]]
    affine[0, 3] = origin
    return ScanRow(
        key=key,
        subject=subject,
        study=study,
        modality="CT",
        contrast="",
        unit="HU",
        shape=shape,
        spacing_mm=(1, 1, 1),
        affine_44=tuple(map(tuple, affine.tolist())),
        frame=frame,
        scale=1,
        offset=0,
        content_hash=key,
        original_shape=shape,
        original_spacing_mm=(1, 1, 1),
        foreground_box=((0, 0, 0), shape),
        statistics=STATISTICS,
    )


def relations(scans, **declared):
    stated = {frozenset(key.split("_")): relation for key, relation in declared.items()}
    return {(p.scan_a, p.scan_b): p.relation for p in derive_pairs(scans, declared=stated).rows}


def test_what_the_rows_alone_prove():
    scans = [scan("a"), scan("b"), scan("c", study="d2"), scan("x", subject="t")]
    assert relations(scans) == {
        ("a", "b"): "same_study",
        ("a", "c"): "same_subject",
        ("b", "c"): "same_subject",
    }


def test_one_frame_is_same_frame_and_never_registered_without_a_word():
    assert relations([scan("a", frame="f"), scan("b", frame="f")]) == {("a", "b"): "same_frame"}


def test_declared_goes_before_derived():
    scans = [scan("a", frame="f"), scan("b", frame="f"), scan("c", study="d2")]
    assert relations(scans, a_b="registered", b_c="same_frame") == {
        ("a", "b"): "registered",
        ("a", "c"): "same_subject",
        ("b", "c"): "same_frame",
    }


@pytest.mark.parametrize("other", [{"shape": (4, 4, 5)}, {"origin": 2.0}])
def test_registered_on_two_grids_is_only_same_frame(other):
    pairs = derive_pairs([scan("a"), scan("b", **other)], declared={frozenset("ab"): "registered"})
    assert [p.relation for p in pairs.rows] == ["same_frame"]
    assert pairs.demoted == pairs.rows


def test_two_subjects_make_no_pair():
    with pytest.raises(ValueError, match="two subjects"):
        derive_relation(scan("a"), scan("b", subject="t"))
