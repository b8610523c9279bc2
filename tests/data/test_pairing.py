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


# -- real scans of one person ------------------------------------------------------------------------------------------


def _worst_miss(archive, case_a, case_b):
    """Largest distance, in voxels of B along any axis, from a tumour voxel of A to the nearest one of B.

    Each label is the source's own on that scan's grid; the places between them are the archive's affines alone.
    """
    from scipy.ndimage import distance_transform_edt

    a, b = (archive.scans[case.scans[0]] for case in (case_a, case_b))
    mine = archive.read_label(case_a.case, (0, 0, 0), a.shape) == 1
    theirs = archive.read_label(case_b.case, (0, 0, 0), b.shape) == 1
    assert mine.any()
    assert theirs.any()
    index = np.argwhere(mine)
    mapping = np.linalg.inv(np.array(b.affine_44)) @ np.array(a.affine_44)
    at = np.round(index @ mapping[:3, :3].T + mapping[:3, 3]).astype(int)
    inside = (at >= 0).all(axis=1) & (at < b.shape).all(axis=1)
    assert inside.all()
    where = distance_transform_edt(~theirs, return_distances=False, return_indices=True)
    nearest = where[(slice(None), *at.T)].T
    return np.abs(nearest - at).max()


@pytest.mark.realdata
@pytest.mark.parametrize("kind", ["dicom", "nifti on native grids"])
def test_a_tumour_voxel_lies_in_the_tumour_of_every_modality(real_data, tmp_path, kind):
    """CT, PET and MR of one person, each with the tumour drawn on its own grid (RTSTRUCT; one mask per modality)."""
    from itertools import permutations

    from medseg_ssl.data.archive import Archive
    from medseg_ssl.data.prepare import PrepareConfig, prepare

    if kind == "dicom":
        root = real_data / "dicom_odd" / "ct_pet_mr_rtstruct_STS_002"
        source = {"name": "dicom", "regions": {"GTV": ["GTV.*"]}}
    else:
        root = real_data / "sts_ct_pet_mr"
        source = {
            "name": "folder",
            "pattern": "{subject}/{modality}_image.nii.gz",
            "modalities": {
                "CT": {"modality": "CT"},
                "PET": {"modality": "PT", "unit": "SUV"},
                "MR_T1": {"modality": "MR", "contrast": "T1w"},
            },
            "label_pattern": "{subject}/{modality}_mask.nii.gz",
            "classes": {1: "GTV"},
            "relation": "same_frame",
        }
    config = PrepareConfig.model_validate({"source": source, "split": {"test": 0, "development": 0}})
    archive = Archive.open(prepare(config, [root], tmp_path / "out"))
    assert sorted(row.modality for row in archive.scans.values()) == ["CT", "MR", "PT"]
    assert [pair.relation for pair in archive.pairs] == ["same_frame"] * 3
    assert all(pair.offset_mm is not None and pair.offset_mm < 4 for pair in archive.pairs)
    for case_a, case_b in permutations(archive.cases.values(), 2):
        assert _worst_miss(archive, case_a, case_b) <= 1, "voxels"
