"""Otsu's thresholds and what is made of them, with known answers."""

import numpy as np
import pytest

from medseg_ssl.baselines import _parts
from medseg_ssl.baselines._cases import Example, Seen
from medseg_ssl.baselines._classical import flood, largest_piece, opened, otsu_thresholds
from medseg_ssl.baselines.threshold import Threshold
from medseg_ssl.config import ConfigError, parse
from tests.baselines.bodies import truth, write


def test_levels_of_few_values_are_parted_exactly():
    values = np.repeat([3.0, 7.3, 20.0], (50, 30, 20))
    (one,) = otsu_thresholds(values[:80], levels=2, bins=128)
    assert 3.0 < one <= 7.3
    low, high = otsu_thresholds(values, levels=3, bins=128)
    np.testing.assert_array_equal(np.digitize(values, (low, high)), np.repeat([0, 1, 2], (50, 30, 20)))
    assert len(otsu_thresholds(values, levels=4, bins=128)) == 2  # three values have three levels
    assert otsu_thresholds(np.full(9, 5.0), levels=2, bins=128) == ()
    assert otsu_thresholds(np.zeros(0), levels=2, bins=128) == ()


def test_organs_of_one_intensity_each_are_found_exactly(tmp_path):
    """The threshold is each case's own: another body of other contrast is parted as well."""
    archive = write(tmp_path, noise=0.0)
    baseline = Threshold(Threshold.Config(levels=(2, 3)))
    baseline.fit(archive, ["c0"], seed=0)
    for case, label_DHW in baseline.predict_cases(archive, ["c1", "c2"]):
        np.testing.assert_array_equal(label_DHW, truth(archive, case))


def test_a_piece_apart_is_left_out_where_training_says_so():
    parts = np.zeros((6, 8, 10), np.uint8)
    parts[1:4, 1:6, 1:5] = 2
    parts[3:5, 4:7, 7:9] = 2  # of the same level, elsewhere
    parts[parts == 0] = 1
    label = np.zeros_like(parts)
    label[1:4, 1:6, 1:5] = 1
    seen = Seen(
        np.zeros((1, *parts.shape), np.float32), np.ones(parts.shape, bool), np.diag([3.0, 2.0, 1.0, 1.0])
    )
    example = Example(seen, label, (True, True))

    def parts_of(_, __):
        return parts, 2

    choices = _parts.choose([example], ["any"], parts_of, openings_mm=(0.0,))
    assert choices == {1: _parts.Choice("any", (2,), 0.0, True, 1.0)}
    np.testing.assert_array_equal(_parts.predict(seen, choices, parts_of), label)


def test_unknown_voxels_and_classes_decide_nothing():
    parts = np.ones((4, 5, 6), np.uint8)
    parts[:2] = 2
    label = np.zeros_like(parts)
    label[0], label[1] = 1, 255
    seen = Seen(np.zeros((1, *parts.shape), np.float32), np.ones(parts.shape, bool), np.eye(4))

    def parts_of(_, __):
        return parts, 2

    choices = _parts.choose([Example(seen, label, (True, True))], [0], parts_of, openings_mm=(0.0,))
    assert choices[1].dice == 1.0
    assert _parts.choose([Example(seen, label, (True, False))], [0], parts_of, openings_mm=(0.0,)) == {}


def test_openings_are_balls_in_millimetres():
    region = np.zeros((9, 15, 15), bool)
    region[2:7, 2:8, 2:8] = True
    region[4, 4, 8:14] = True  # a thread
    kept = opened(region, 1.5, spacing_mm=(3.0, 1.0, 1.0))
    assert not kept[4, 4, 10:].any()
    assert kept[4, 4, 5]
    # along slices of 3 mm a ball of 1.5 mm holds one slice alone
    flat = np.zeros((9, 15, 15), bool)
    flat[4, 3:12, 3:12] = True
    assert opened(flat, 1.5, spacing_mm=(3.0, 1.0, 1.0))[4, 7, 7]
    assert not opened(flat, 1.5, spacing_mm=(1.0, 1.0, 1.0)).any()
    np.testing.assert_array_equal(opened(region, 0.0, spacing_mm=(1.0, 1.0, 1.0)), region)


def test_pieces_touch_by_faces():
    region = np.zeros((3, 4, 5), bool)
    region[0, 0, :2] = True
    region[1, 1, 2:5] = True  # touches the first at an edge only
    np.testing.assert_array_equal(np.argwhere(largest_piece(region))[:, 2], [2, 3, 4])
    assert np.count_nonzero(flood(region, (0, 0, 0))) == 2
    assert not flood(region, (2, 0, 0)).any()
    assert not largest_piece(np.zeros((2, 3, 4), bool)).any()


def test_levels_that_make_no_sense_are_refused():
    with pytest.raises(ConfigError, match="levels must be numbers from 2 to 5"):
        parse(Threshold.Config, {"levels": [1, 2]})
    with pytest.raises(ConfigError, match="openings_mm"):
        parse(Threshold.Config, {"openings_mm": [-1.0]})
