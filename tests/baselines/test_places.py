"""Baselines that know places: the mean label, the crop's shape alone, and intensity with place."""

import numpy as np
import pytest

from medseg_ssl.baselines._cases import filled_label
from medseg_ssl.baselines._places import MeanLabel, box_of
from medseg_ssl.baselines.intensity_prior import IntensityPrior
from medseg_ssl.baselines.position_prior import PositionPrior, cut
from medseg_ssl.baselines.size_only import SizeOnly
from medseg_ssl.config import ConfigError, parse
from medseg_ssl.data.manifest import CaseRow
from tests.baselines.bodies import SHAPE, truth, write
from tests.data.small_archive import make_archive, scan_row


def crops(path, shapes, *, filled=lambda *index: True, half=(), subjects=None, known=None, noise=0):
    """Crops whose label is the middle half of each axis (in part), over voxels that say nothing of it.

    Those numbered ``half`` have what is left of the middle alone; each is of a subject of its own unless it is named.
    """
    scans, cases = [], []
    for number, shape in enumerate(shapes):
        subject = f"s{number}" if subjects is None else subjects[number]
        index = np.meshgrid(*((np.arange(n) + 0.5) / n - 0.5 for n in shape), indexing="ij")
        label = np.all([np.abs(axis) < 0.25 for axis in index], axis=0) & filled(*index)
        label &= (index[2] < 0) if number in half else True
        volume = np.random.default_rng(number + noise).normal(100, 30, shape)
        row = scan_row(f"v{number}", shape, subject=subject, spacing_mm=(3.0, 2.0, 1.5))
        scans.append((row, volume))
        states = (True, True) if known is None else known[number]
        row = CaseRow(
            case=f"c{number}", subject=subject, scans=(row.key,), labeled=True, known_classes=states
        )
        cases.append((row, label))
    return make_archive(path, scans, cases=cases, classes=("background", "middle"))


SHAPES = ((8, 12, 16), (12, 16, 8), (16, 8, 24))


@pytest.mark.parametrize(
    "baseline",
    [
        SizeOnly(SizeOnly.Config()),
        SizeOnly(SizeOnly.Config(place="centre")),
        PositionPrior(PositionPrior.Config(lattice=(16, 16, 16))),
    ],
    ids=["size", "size, centred", "position"],
)
def test_a_label_that_follows_the_crop_is_found_without_a_look_at_it(tmp_path, baseline):
    archive = crops(tmp_path / "a", SHAPES)
    baseline.fit(archive, ["c0", "c1"], seed=0)
    ((_, found),) = baseline.predict_cases(archive, ["c2"])
    np.testing.assert_array_equal(found, archive.original_label("c2")[0])
    # other voxels, the same shapes: the same answer
    other = crops(tmp_path / "b", SHAPES, noise=50)
    assert (other.read("v2", (0, 0, 0), SHAPES[2]) != archive.read("v2", (0, 0, 0), SHAPES[2])).any()
    ((_, again),) = baseline.predict_cases(other, ["c2"])
    np.testing.assert_array_equal(found, again)


def test_voxels_are_never_read(tmp_path, monkeypatch):
    archive = crops(tmp_path, SHAPES)

    def refused(*_, **__):
        raise AssertionError("voxels were read")

    monkeypatch.setattr(type(archive), "read", refused)
    for kind in (SizeOnly, PositionPrior):
        baseline = kind(kind.Config())
        baseline.fit(archive, ["c0"], seed=0)
        assert dict(baseline.predict_cases(archive, ["c1"]))["c1"].any()


def test_the_form_that_fits_is_drawn(tmp_path):
    archive = crops(
        tmp_path,
        [(24, 32, 40)] * 2,
        filled=lambda d, h, w: (d / 0.25) ** 2 + (h / 0.25) ** 2 + (w / 0.25) ** 2 <= 1,
    )
    baseline = SizeOnly(SizeOnly.Config())
    baseline.fit(archive, ["c0"], seed=0)
    shape = baseline._shapes[1]
    assert (shape.form, shape.factor) == ("ellipsoid", 1.0)
    np.testing.assert_allclose(shape.half, 0.25, atol=0.02)
    np.testing.assert_array_equal(dict(baseline.predict_cases(archive, ["c1"]))["c1"], truth(archive, "c1"))


def test_the_mean_is_over_the_cases_that_state_a_class(tmp_path):
    archive = crops(tmp_path, SHAPES, known=((True, True), (True, False), (True, True)))
    labels = MeanLabel.of(archive, ["c0", "c1"], frame="crop", size=(8, 8, 8))
    mean = labels.mean_KDHW()
    assert mean[1].max() == 1.0  # not a half: one case states it and shows it
    np.testing.assert_allclose(mean.sum(axis=0), 1.0)
    assert labels.mean_KDHW(without=[0])[1].max() == 0.0


def test_shares_are_cut_where_held_out_cases_fit_best(tmp_path):
    """Two of three cases have half of the label: of it a share of 1/3 or 2/3 remains, and 0.2 would take all."""
    shapes = [(8, 12, 16)] * 3
    archive = crops(tmp_path, shapes, filled=lambda d, h, w: w < 0.1)
    baseline = PositionPrior(PositionPrior.Config(lattice=(8, 12, 16)))
    baseline.fit(archive, ["c0", "c1", "c2"], seed=0)
    assert baseline._share == 0.2  # equal labels: every share fits, the first one is taken
    shares = np.stack([np.full((1, 2, 3), 0.4), np.full((1, 2, 3), 0.35), np.full((1, 2, 3), 0.25)])
    assert (cut(shares, 0.6) == 1).all()
    assert (cut(shares, 0.61) == 0).all()
    with pytest.raises(ConfigError, match="between 0 and 1"):
        parse(PositionPrior.Config, {"shares": [0.5, 1.0]})


def test_a_subjects_other_cases_do_not_tell_where_to_cut(tmp_path):
    """Four cases of one subject show all of the middle, one each of two others half of it.

    With its own three other cases a case of the first would be found by every share up to 0.6, and 0.2 would win;
    without them it loses half at any share, and 0.9 is right for the other two.
    """
    cases = [f"c{n}" for n in range(6)]
    archive = crops(tmp_path / "a", [(8, 12, 16)] * 6, half=(4, 5), subjects=[*"aaaabc"])
    baseline = PositionPrior(PositionPrior.Config(lattice=(8, 12, 16), shares=(0.2, 0.9)))
    baseline.fit(archive, cases, seed=0)
    assert baseline._share == 0.9
    apart = crops(tmp_path / "b", [(8, 12, 16)] * 6, half=(4, 5))
    baseline.fit(apart, cases, seed=0)
    assert baseline._share == 0.2
    baseline.fit(archive, cases[:4], seed=0)
    assert baseline._share == 0.5, "one subject: nobody is left to ask"


def test_a_body_frame_follows_the_body(tmp_path):
    archive = write(tmp_path)
    row = archive.scans["s0-MR"]
    archive.scans["s0-MR"] = row.model_copy(update={"foreground_box": ((2, 3, 4), (12, 17, 22))})
    box = box_of(archive, "c0", "body")
    np.testing.assert_allclose(box.relative(np.array([[2, 3, 4]]) - 0.5), -0.5)
    np.testing.assert_allclose(box.index(np.array([[0.0, 0.0, 0.0]])), [[6.5, 9.5, 12.5]])
    assert tuple(box_of(archive, "c0", "crop").extent) == SHAPE


def test_unlabeled_slices_are_filled_from_their_neighbours(tmp_path):
    whole = write(tmp_path / "whole", shifts=((0, 0, 0),))
    part = write(tmp_path / "part", shifts=((0, 0, 0),), unlabeled=(5, 9, 10))
    found, label = filled_label(part, "c0"), filled_label(whole, "c0")
    assert found.max() == 2
    kept = np.setdiff1d(np.arange(SHAPE[0]), (5, 9, 10))
    np.testing.assert_array_equal(found[kept], label[kept])
    np.testing.assert_array_equal(found[9], label[8])
    np.testing.assert_array_equal(found[10], label[11])
    nothing = write(tmp_path / "nothing", shifts=((0, 0, 0),), unlabeled=range(SHAPE[0]))
    assert not filled_label(nothing, "c0").any()


def test_intensity_decides_where_places_do_not_and_places_where_intensities_do_not(tmp_path):
    archive = write(tmp_path, noise=0.0)
    baseline = IntensityPrior(IntensityPrior.Config(smoothing_mm=0.0, lattice=(14, 20, 26)))
    baseline.fit(archive, ["c0"], seed=0)
    for case, label_DHW in baseline.predict_cases(archive, ["c1", "c2"]):
        np.testing.assert_array_equal(label_DHW, truth(archive, case))  # organs moved, of their own intensity
    # intensities that say nothing: the place of the training case
    flat = crops(tmp_path / "flat", SHAPES)
    baseline.fit(flat, ["c0"], seed=0)
    found, label = dict(baseline.predict_cases(flat, ["c1"]))["c1"], truth(flat, "c1")
    assert 2 * np.count_nonzero(found & label) / np.count_nonzero([found, label]) > 0.85
