"""The phantom: geometry in millimetres, intensities in their units, noise, relations, determinism, refusals."""

import csv
import json
from itertools import combinations

import numpy as np
import pytest

from medseg_ssl.config import UserError, parse, read_yaml
from medseg_ssl.data.nifti import read_label, read_nifti
from medseg_ssl.data.phantom import pose, relation, write_phantom
from medseg_ssl.data.phantom_body import CLASSES, LESION_CLASS, TISSUES, Body, Waves, labels
from medseg_ssl.data.phantom_imaging import ct, fdg_pet, mr
from medseg_ssl.data.sources.folder import Folder
from medseg_ssl.types import RELATIONS

SUBJECTS = 4


@pytest.fixture(scope="module")
def phantom(tmp_path_factory):
    return write_phantom(tmp_path_factory.mktemp("phantom") / "raw", subjects=SUBJECTS, seed=3)


def scans_of(folder):
    return sorted(p.name[:-7] for p in folder.glob("*.nii.gz") if "label" not in p.name)


def centroid_mm(label, value):
    index = np.argwhere(label.array == value).mean(axis=0)
    return (label.affine_44 @ np.array([*index, 1.0]))[:3]


def whole(label, value):
    """The organ does not touch the edge of the grid, where it would be cut."""
    where = np.argwhere(label.array == value)
    return len(where) > 50 and where.min() > 0 and (where.max(axis=0) < np.array(label.array.shape) - 1).all()


def test_every_scan_has_its_label_and_its_grid(phantom):
    folders = sorted(p for p in phantom.iterdir() if p.is_dir())
    assert [f.name for f in folders] == [f"sub-{i:03d}" for i in range(1, SUBJECTS + 1)]
    for folder in folders:
        assert {"day1_CT", "day1_PET", "day1_T1", "day1_T2"} <= set(scans_of(folder))
        for scan in scans_of(folder):
            image, label = read_nifti(folder / f"{scan}.nii.gz"), read_label(folder / f"{scan}_label.nii.gz")
            assert image.array.shape == label.array.shape
            np.testing.assert_array_equal(image.affine_44, label.affine_44)
            assert set(np.unique(label.array)) <= {0, *CLASSES}
    ct_, pet, t1 = (read_nifti(folders[0] / f"day1_{t}.nii.gz") for t in ("CT", "PET", "T1"))
    assert ct_.array.shape == pet.array.shape == (48, 64, 64)
    np.testing.assert_array_equal(ct_.affine_44, pet.affine_44)
    assert ct_.spacing_mm == (4.0, 4.0, 4.0)
    assert t1.spacing_mm == pytest.approx((5.0, 3.5, 3.5))


def test_some_subjects_have_another_day(phantom):
    days = [(f / "day2_T1.nii.gz").exists() for f in phantom.iterdir() if f.is_dir()]
    assert 0 < sum(days) < SUBJECTS


@pytest.mark.parametrize("other", ["PET", "T1", "T2"])
def test_organs_lie_where_the_poses_say(phantom, other):
    poses = json.loads((phantom / "truth.json").read_text())["body_to_ras_44"]
    checked = 0
    for subject, scans in poses.items():
        first = read_label(phantom / subject / "day1_CT_label.nii.gz")
        second = read_label(phantom / subject / f"day1_{other}_label.nii.gz")
        motion = np.array(scans[f"day1_{other}"]) @ np.linalg.inv(np.array(scans["day1_CT"]))
        if other == "T2":
            assert np.abs(motion - np.eye(4)).max() > 0.02
        else:
            np.testing.assert_allclose(motion, np.eye(4), atol=1e-12)
        for value in CLASSES:
            if value == 5 or not (whole(first, value) and whole(second, value)):
                continue  # the aorta runs through the whole field of view
            expected = (motion @ np.array([*centroid_mm(first, value), 1.0]))[:3]
            np.testing.assert_allclose(centroid_mm(second, value), expected, atol=1.5)
            checked += 1
    assert checked >= 2 * SUBJECTS


def test_images_show_what_the_labels_say(phantom):
    """Mean intensity inside an eroded organ is in its physical range in every subject."""
    from scipy.ndimage import binary_erosion

    ranges = {"CT": {1: (35, 110), 2: (45, 160), 3: (50, 220)}, "PET": {1: (1.3, 4.0), 3: (1.2, 8.0)}}
    for folder in (p for p in phantom.iterdir() if p.is_dir()):
        for token, expected in ranges.items():
            image = read_nifti(folder / f"day1_{token}.nii.gz").array
            label = read_label(folder / f"day1_{token}_label.nii.gz").array
            for value, (low, high) in expected.items():
                inside = binary_erosion(label == value)
                if inside.sum() > 30:
                    assert low < np.median(image[inside]) < high, (folder.name, token, CLASSES[value])
        image = read_nifti(folder / "day1_CT.nii.gz").array
        assert image.min() >= -1024
        assert -1010 < np.median(image[:, :3]) < -950
        assert image.max() > 200


def uniform(tissue):
    return np.full((24, 24, 24), TISSUES.index(tissue), dtype=np.uint8)


def test_noise_of_each_modality():
    spacing = (4.0, 4.0, 4.0)
    air_ct = ct(uniform("air"), spacing, np.random.default_rng(0)).astype(float)
    assert 6 < air_ct.std() < 18
    # Rician: magnitudes in air are positive and far from zero mean
    mixed = uniform("liver")
    mixed[:12] = TISSUES.index("air")
    image = mr(mixed, spacing, np.random.default_rng(0), sequence="T1w").astype(float)
    air, organ = image[:8], image[16:]
    assert air.min() >= 0
    assert air.mean() / air.std() == pytest.approx(np.sqrt(np.pi / 2) / np.sqrt(2 - np.pi / 2), rel=0.1)
    assert organ.mean() > 8 * air.mean()
    # counting: variance grows with the mean
    low, high = (fdg_pet(uniform(t), spacing, np.random.default_rng(0)) for t in ("lung", "kidney"))
    assert low.dtype == np.float32
    assert high.std() > 1.5 * low.std()


def test_t1_and_t2_weighting():
    """Fluid is dark in T1w and bright in T2w against muscle."""
    tissue = uniform("muscle")
    tissue[12:] = TISSUES.index("bladder")
    for sequence, brighter in (("T1w", False), ("T2w", True)):
        image = mr(tissue, (4.0, 4.0, 4.0), np.random.default_rng(1), sequence=sequence)
        assert (image[16:].mean() > image[:8].mean()) == brighter


def test_relations_are_declared_for_every_pair(phantom):
    rows = list(csv.DictReader((phantom / "relations.csv").open()))
    assert {r["relation"] for r in rows} == set(RELATIONS)
    for folder in (p for p in phantom.iterdir() if p.is_dir()):
        own = {frozenset((r["a"], r["b"])) for r in rows if r["subject"] == folder.name}
        assert own == {frozenset(pair) for pair in combinations(scans_of(folder), 2)}
    assert relation("day1_CT", "day1_PET") == "registered"
    assert relation("day1_T1", "day1_PET") == "same_frame"
    assert relation("day1_T1", "day1_T2") == "same_study"
    assert relation("day1_T1", "day2_T1") == "same_subject"


def test_shipped_config_lists_it(phantom, request):
    tree = read_yaml(request.config.rootpath / "configs" / "prepare" / "phantom.yaml")
    source = {k: v for k, v in tree["source"].items() if k != "name"}
    listing = Folder(parse(Folder.Config, source)).list(phantom)
    assert not listing.rejected
    labeled = [c for c in listing.cases if c.label is not None]
    assert len(labeled) == SUBJECTS
    assert {s.modality for c in labeled for s in c.scans} == {"CT"}
    assert {s.modality for c in listing.cases for s in c.scans} == {"CT", "MR", "PT"}
    assert listing.classes == {0: "background", **CLASSES}
    assert {r.relation for r in listing.relations} == set(RELATIONS)


def voxels(folder):
    return {
        p.relative_to(folder): read_nifti(p, allow_constant=True).array
        for p in sorted(folder.rglob("*.nii.gz"))
    }


def test_same_seed_same_voxels_whatever_the_number_of_subjects(tmp_path):
    small = {"size": (16, 20, 20), "spacing_mm": (12.0, 12.0, 12.0)}
    one = voxels(write_phantom(tmp_path / "one", subjects=1, seed=5, **small))
    two = voxels(write_phantom(tmp_path / "two", subjects=2, seed=5, **small))
    other = voxels(write_phantom(tmp_path / "other", subjects=1, seed=6, **small))
    for name, array in one.items():
        np.testing.assert_array_equal(array, two[name])
    first = next(iter(one))
    assert not np.array_equal(one[first], other[first])


def test_subjects_and_days_differ_smoothly():
    affine = np.array([[0, 0, 6.0, -90], [0, 6.0, 0, -90], [6.0, 0, 0, -90], [0, 0, 0, 1]])
    grid = (affine, (30, 30, 30))
    first, second = (Body.draw(0, s, lesion_share=0.0) for s in (0, 1))
    later = first.other_day(0, 0)
    base, other, follow = (labels(b.tissues(*grid), lesions=False) for b in (first, second, later))

    def overlap(a, b):
        return 2 * ((a == b) & (a > 0)).sum() / ((a > 0).sum() + (b > 0).sum())

    assert 0.2 < overlap(base, other) < 0.8
    assert overlap(base, other) < overlap(base, follow) < 1.0
    field = Waves.draw(np.random.default_rng(0), rms=5.0, wavelength_mm=(90.0, 260.0)).on_grid(*grid)
    assert np.abs(np.diff(field, axis=1)).max() / 6.0 < 1.0  # less than one: the deformation does not fold


def test_waves_on_a_grid_are_the_sum_of_sines():
    waves = Waves.draw(np.random.default_rng(0), rms=2.0, wavelength_mm=(20.0, 60.0), count=3)
    affine = np.random.default_rng(1).normal(size=(4, 4)) * 5
    field = waves.on_grid(affine, (4, 5, 6))
    place = (affine @ np.array([3, 1, 4, 1.0]))[:3]
    expected = np.sin(waves.frequencies_W3 @ place + waves.phases_W) @ waves.amplitudes_WC
    np.testing.assert_allclose(field[:, 3, 1, 4], expected, rtol=1e-4)


def test_lesions_are_a_class_only_where_asked(tmp_path):
    small = {"size": (24, 32, 32), "spacing_mm": (8.0, 8.0, 8.0), "subjects": 3, "lesion_share": 1.0}
    plain = voxels(write_phantom(tmp_path / "plain", **small))
    named = voxels(write_phantom(tmp_path / "named", label_lesions=True, **small))
    name = next(n for n in named if n.name == "day1_CT_label.nii.gz")
    assert (named[name] == LESION_CLASS).any()
    assert (plain[name][named[name] == LESION_CLASS] == 1).all()
    assert "6" in json.loads((tmp_path / "named" / "truth.json").read_text())["classes"]


def test_poses_are_rigid():
    for scan in ("day1_CT", "day1_T2", "day2_T1"):
        matrix = pose(0, 1, scan)
        np.testing.assert_allclose(matrix[:3, :3] @ matrix[:3, :3].T, np.eye(3), atol=1e-12)
        assert np.linalg.det(matrix[:3, :3]) == pytest.approx(1.0)


def test_refusals(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is not empty"):
        write_phantom(tmp_path, subjects=1)
    with pytest.raises(UserError, match="cannot write the phantom"):
        write_phantom(tmp_path / "file" / "below", subjects=1)
    with pytest.raises(UserError, match="at least 1 subject and 16 voxels"):
        write_phantom(tmp_path / "new", subjects=0)
