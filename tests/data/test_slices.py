"""Crops of one slice (2D) and of a few (2.5D): cut from slices that were taken, turned within their plane."""

import numpy as np
import pytest
import torch

from medseg_ssl.data.augment import SPATIAL, Spatial, draw_move, prepare_batch
from medseg_ssl.data.loader import Loader
from medseg_ssl.data.manifest import CaseRow
from medseg_ssl.types import ViewSpec
from tests.data.small_archive import make_archive, scan_row

ALWAYS = Spatial(rotation_p=1, rotation_deg=30, scale_p=1, scale=(0.7, 0.9))


def move(size, spacing_mm=(1.0, 1.0, 1.0), seed=0):
    return draw_move(ALWAYS, np.random.default_rng(seed), spacing_mm=spacing_mm, size=size).linear_33


@pytest.mark.parametrize(
    ("size", "axis"), [((1, 32, 24), 0), ((3, 32, 24), 0), ((32, 1, 24), 1), ((32, 24, 5), 2)]
)
def test_a_thin_crop_is_turned_and_scaled_within_its_plane(size, axis):
    for seed in range(10):
        linear = move(size, seed=seed)
        still = np.eye(3)[axis]
        np.testing.assert_array_equal(linear[axis], still)
        np.testing.assert_array_equal(linear[:, axis], still)
        plane = np.delete(np.delete(linear, axis, 0), axis, 1)
        assert abs(plane[0, 1]) > 1e-3
        assert 0.7 <= np.sqrt(np.linalg.det(plane)) <= 0.9


def test_a_thick_crop_is_turned_about_every_axis():
    linear = move((16, 32, 48))
    assert np.all(np.abs(linear[~np.eye(3, dtype=bool)]) > 1e-3)
    assert 0.7 <= np.cbrt(np.linalg.det(linear)) <= 0.9


def test_a_slice_across_thick_voxels_is_not_turned():
    """Its plane holds an axis of long voxels: turning within it would blur them, out of it would leave the slice."""
    linear = move((1, 32, 32), spacing_mm=(1.0, 1.0, 5.0))
    np.testing.assert_array_equal(linear, np.diag(np.diag(linear)))


SHAPE = (9, 30, 34)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """Isotropic, so that only the crop's own shape keeps it in its plane; slice k holds 100 + 10 k everywhere."""
    slices = np.arange(SHAPE[0])[:, None, None]
    volume, label = np.broadcast_to(100 + 10 * slices, SHAPE), np.broadcast_to(slices % 3, SHAPE)
    single = np.full((1, 30, 34), 150)
    scans = [(scan_row("v", SHAPE), volume), (scan_row("one", single.shape, subject="s1"), single)]
    cases = [
        (CaseRow(case="cv", subject="s0", scans=("v",), labeled=True, known_classes=(True,) * 3), label),
        (
            CaseRow(case="c1", subject="s1", scans=("one",), labeled=True, known_classes=(True,) * 3),
            single * 0 + 1,
        ),
    ]
    classes = ("background", "a", "b")
    return make_archive(tmp_path_factory.mktemp("slices"), scans, cases=cases, classes=classes)


def views(archive, spec, *, scan, steps=12):
    plan = {"crop": spec}
    case = {"v": "cv", "one": "c1"}[scan]
    chosen = {"cases": [case]} if spec.labeled else {"subjects": [archive.scans[scan].subject]}
    loader = Loader(archive, plan, batch_size=2, seed=3, steps=steps, **chosen)
    for batch in loader:
        yield from batch.views["crop"]


@pytest.mark.parametrize("size", [(1, 16, 20), (3, 16, 20)], ids=str)
@pytest.mark.parametrize("augment", ["none", "strong", "segmentation"])
def test_every_slice_of_a_crop_is_one_that_was_taken(archive, size, augment):
    line = archive.linear("v")
    taken = line.apply(np.arange(100, 190, 10, dtype=np.float32))
    spec = ViewSpec(count=2, size=size, augment=augment, overlap=0.5)
    turned = 0
    for view in views(archive, spec, scan="v"):
        for image, valid, affine in zip(
            view.image_BCDHW[:, 0], view.valid_BDHW, view.affine_B44, strict=True
        ):
            turned += bool(affine[0, 1] != 0)
            first = affine[2, 3].item() - 100  # slices are 1 mm apart, and the first one lies at z = 100
            for number, (plane, known) in enumerate(zip(image, valid, strict=True)):
                np.testing.assert_allclose(plane[known], taken[round(first) + number], atol=1e-5)
                assert known.any()
            assert affine[2, :3].tolist() == [1.0, 0.0, 0.0]
    assert (turned > 3) == (augment != "none")


def test_labels_of_a_slice_are_its_own(archive):
    spec = ViewSpec(count=1, size=(1, 16, 20), augment="segmentation", labeled=True)
    seen = set()
    for view in views(archive, spec, scan="v"):
        for label, valid, affine in zip(view.label_BDHW, view.valid_BDHW, view.affine_B44, strict=True):
            (value,) = label[valid].unique().tolist()
            assert value == round(affine[2, 3].item() - 100) % 3
            seen.add(value)
    assert seen == {0, 1, 2}


@pytest.mark.parametrize("labeled", [False, True])
@pytest.mark.parametrize("depth", [1, 3])
def test_a_scan_of_a_single_slice(archive, depth, labeled):
    spec = ViewSpec(count=1, size=(depth, 16, 20), augment="strong", labeled=labeled)
    value = archive.linear("one").apply(np.full(1, 150, np.float32)).item()
    for view in views(archive, spec, scan="one"):
        assert view.valid_BDHW.any((2, 3)).sum(1).tolist() == [1, 1]
        shown = view.image_BCDHW[:, 0][view.valid_BDHW]
        torch.testing.assert_close(shown, torch.full_like(shown, value))


@pytest.mark.parametrize("augment", ["weak", "strong", "segmentation"])
def test_intensities_of_a_slice_are_augmented(archive, augment):
    plan = {"crop": ViewSpec(count=1, size=(1, 16, 20), augment=augment)}
    changed = 0
    for batch in Loader(archive, plan, batch_size=8, seed=0, steps=4):
        before = batch.views["crop"][0].image_BCDHW.clone()
        after = prepare_batch(batch, plan).views["crop"][0]
        assert after.image_BCDHW.isfinite().all()
        changed += int((after.image_BCDHW != before).flatten(1).any(1).sum())
    assert changed > 8
    assert SPATIAL[augment].scale_p > 0
