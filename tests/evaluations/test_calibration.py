"""Calibration: numbers that can be computed by hand."""

import numpy as np
import pytest

from medseg_ssl.config import ConfigError
from medseg_ssl.evaluations.calibration import (
    Calibration,
    calibration_table,
    case_bins,
    case_rows,
    reliability_table,
)
from medseg_ssl.inference.predictor import Predictor
from medseg_ssl.types import UNKNOWN_LABEL
from tests.evaluations.fakes import MemoryArchive, Threshold, bright_cube, card

OPTIONS = {
    "classes": ("background", "organ"),
    "spacing_mm": (3.0, 1.0, 2.0),
    "known": (),
    "margin_mm": None,
    "bins": 10,
}


def test_known_answers():
    """Half of the voxels at 0.85 of which 3/5 are of the class, half at 0.15 of which none is."""
    p = np.full((10, 10, 2), 0.15)
    p[:, :, 0] = 0.85
    label = np.zeros(p.shape, np.uint8)
    label[:6, :, 0] = 1
    found = case_bins(np.stack([1 - p, p]), label, case="c", **OPTIONS)
    (row,) = case_rows(found)
    assert row["ece"] == pytest.approx(0.5 * 0.25 + 0.5 * 0.15)
    assert row["brier"] == pytest.approx(0.5 * (0.6 * 0.15**2 + 0.4 * 0.85**2) + 0.5 * 0.15**2)
    assert row["overconfidence"] == pytest.approx(0.5 - 0.3)
    low, high = reliability_table(found)
    assert (low["low"], low["voxels"], low["frequency"]) == (0.1, 100, 0.0)
    assert high["confidence"] == pytest.approx(0.85)
    assert high["frequency"] == pytest.approx(0.6)


def test_what_says_what_is_true_has_no_error():
    generator = np.random.default_rng(0)
    p = generator.uniform(0, 1, (60, 61, 62))
    label = (generator.uniform(0, 1, p.shape) < p).astype(np.uint8)
    (row,) = case_rows(case_bins(np.stack([1 - p, p]), label, case="c", **OPTIONS))
    assert row["ece"] < 0.01
    assert row["brier"] == pytest.approx(1 / 6, abs=0.005)


def test_unknown_voxels_and_classes_do_not_count_and_the_margin_is_in_millimetres():
    p = np.zeros((3, 9, 21, 15))
    p[0] = 1.0
    label = np.zeros((9, 21, 15), np.uint8)
    label[4, 10, 7] = 1
    label[4, 10, 8] = UNKNOWN_LABEL
    options = OPTIONS | {"classes": ("background", "organ", "other"), "known": (True, True, False)}
    (row,) = case_rows(case_bins(p, label, case="c", **options | {"margin_mm": 3.0}))
    reach = {
        (d, h, w)
        for d in range(9)
        for h in range(21)
        for w in range(15)
        if (3 * (d - 4)) ** 2 + (h - 10) ** 2 + (2 * (w - 7)) ** 2 <= 9
    }
    assert row["class"] == "organ"
    assert row["voxels"] == len(reach) - 1
    label[:] = 0
    (row,) = case_rows(case_bins(p, label, case="c", **options | {"margin_mm": 3.0}))
    assert row["voxels"] == p[0].size, "with no foreground anywhere, all voxels count"


def test_the_table_counts_cases_and_not_voxels():
    rows = [
        {"case": c, "class": k, "ece": v, "brier": 0.0, "overconfidence": 0.0}
        for c, k, v in (("a", "x", 0.1), ("b", "x", 0.3), ("a", "y", 0.3), ("b", "y", 0.5))
    ]
    found = calibration_table(rows, subjects={"a": "one", "b": "two"})
    table = {(r["class"], r["measure"]): r for r in found}
    over = table["mean over classes", "ece"]
    assert (over["mean"], over["subjects"], over["cases"]) == (pytest.approx(0.3), 2, 2)
    assert over["ci_high"] == pytest.approx(0.3 + 12.706 * 0.1, rel=1e-3)
    assert table["y", "ece"]["mean"] == pytest.approx(0.4)
    copies = [{**row, "case": f"{row['case']}{n}"} for row in rows for n in range(3)]
    subjects = {f"{case}{n}": subject for case, subject in (("a", "one"), ("b", "two")) for n in range(3)}
    for one, three in zip(found, calibration_table(copies, subjects=subjects), strict=True):
        assert (three["subjects"], three["cases"]) == (2, 6)
        assert (three["ci_low"], three["ci_high"]) == pytest.approx((one["ci_low"], one["ci_high"]))


def test_a_sure_and_right_segmenter_on_its_labels_own_grid():
    archive = MemoryArchive()
    volume = bright_cube((14, 13, 12), (slice(4, 9), slice(3, 11), slice(5, 8)))
    archive.add_scan("s", volume, subject="p", spacing=(2.0, 1.0, 1.0))
    archive.add_case("c", ["s"], (volume > 0).astype(np.uint8))
    archive.set_split(test=("p",))
    scores = {
        s.name: s.value
        for s in Calibration(Calibration.Config()).run(Predictor(Threshold(), card()), archive)
    }
    assert scores["ece"] == pytest.approx(0.0, abs=1e-6)
    assert scores["brier/bright"] == pytest.approx(0.0, abs=1e-6)
    with pytest.raises(ConfigError, match="scores a segmenter"):
        next(iter(Calibration(Calibration.Config()).run(object(), archive)))  # pyright: ignore[reportArgumentType]
