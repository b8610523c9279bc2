"""Region growing, with known answers."""

import numpy as np
import pytest

from medseg_ssl.baselines.region_growing import RegionGrowing
from medseg_ssl.config import ConfigError, parse
from medseg_ssl.data.manifest import CaseRow
from tests.data.small_archive import make_archive, scan_row

SHAPE, SPACING = (12, 18, 24), (3.0, 2.0, 1.0)


def twins(path, places):
    """Two blocks of one intensity per case; the left one (small W) is the class, wherever it stands."""
    scans, cases = [], []
    for number, (d, h, w) in enumerate(places):
        volume, label = np.full(SHAPE, 100.0), np.zeros(SHAPE, np.uint8)
        volume[d : d + 4, h : h + 6, w : w + 5] = 200
        label[volume == 200] = 1
        volume[d : d + 4, h : h + 6, 16:22] = 200
        row = scan_row(f"v{number}", SHAPE, subject=f"s{number}", spacing_mm=SPACING)
        scans.append((row, volume))
        key = (f"v{number}",)
        row = CaseRow(
            case=f"c{number}", subject=f"s{number}", scans=key, labeled=True, known_classes=(True, True)
        )
        cases.append((row, label))
    return make_archive(path, scans, cases=cases, classes=("background", "left"))


def test_the_region_at_the_place_is_taken_and_its_twin_is_not(tmp_path):
    archive = twins(tmp_path, [(4, 6, 4), (5, 5, 6), (3, 7, 3)])
    baseline = RegionGrowing(RegionGrowing.Config(smoothing_mm=0.0, reaches=(3.0,)))
    baseline.fit(archive, ["c0", "c1"], seed=0)
    ((_, found),) = baseline.predict_cases(archive, ["c2"])
    np.testing.assert_array_equal(found, archive.original_label("c2")[0])


def test_nothing_grows_where_no_voxel_is_alike(tmp_path):
    archive = twins(tmp_path, [(4, 6, 4), (4, 6, 4)])
    baseline = RegionGrowing(RegionGrowing.Config(smoothing_mm=0.0, search_mm=0.0))
    baseline.fit(archive, ["c0"], seed=0)
    # the crop is shifted by far more than the search reaches
    moved = twins(tmp_path / "moved", [(0, 0, 10)])
    ((_, found),) = baseline.predict_cases(moved, ["c0"])
    assert not found.any()


def test_intervals_rise():
    with pytest.raises(ConfigError, match="rising pairs of percentiles"):
        parse(RegionGrowing.Config, {"intervals": [[60, 40]]})
