"""Measured alignment of pairs, with known shifts."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from medseg_ssl.data.alignment import (
    Alignment,
    PairTask,
    measure,
    measured_before,
    pairs_to_measure,
    with_measures,
)
from medseg_ssl.data.manifest import PairRow
from medseg_ssl.data.store import NO_DATA, write_volume
from tests.data.small_archive import RECIPE, scan_row

SHAPE, SPACING = (40, 50, 44), (3.0, 2.0, 2.0)


def body(seed=0):
    """A body with organs of several sizes, values 0 to about 1000."""
    generator = np.random.default_rng(seed)
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in SHAPE), indexing="ij")
    volume = 300.0 * (z**2 / 0.8 + y**2 / 0.6 + x**2 / 0.7 < 1)
    for _ in range(12):
        at, size = generator.uniform(-0.6, 0.6, 3), generator.uniform(0.1, 0.3)
        ball = (z - at[0]) ** 2 + (y - at[1]) ** 2 + (x - at[2]) ** 2 < size**2
        volume[ball & (volume > 0)] = generator.uniform(150, 900)
    return gaussian_filter(volume, 1.0)


def placed(tmp_path, key, values, *, shift_mm=(0.0, 0.0, 0.0), no_data=None):
    """A stored scan whose header says that it lies ``shift_mm`` (D, H, W) from where it does."""
    row = scan_row(key, SHAPE, spacing_mm=SPACING, threshold=100.0)
    affine = np.array(row.affine_44)
    affine[:3, 3] += affine[:3, :3] @ (np.array(shift_mm) / SPACING)
    row = row.model_copy(update={"affine_44": tuple(map(tuple, affine.tolist()))})
    stored = values.astype(np.int16)
    if no_data is not None:
        stored[no_data] = NO_DATA
    (tmp_path / "volumes").mkdir(exist_ok=True)
    write_volume(tmp_path, stored, row, recipe=RECIPE, stamp="")
    return row


@pytest.mark.parametrize("shift", [(0.0, 0.0, 0.0), (0.0, 8.0, 0.0), (6.0, -4.0, 2.0)])
def test_a_known_shift_between_two_modalities(tmp_path, shift):
    values = body()
    a = placed(tmp_path, "a", values)
    b = placed(tmp_path, "b", np.where(values > 150, 1100 - values, values), shift_mm=shift)
    found = measure(PairTask(tmp_path, a, b))
    assert found.offset_mm == pytest.approx(np.linalg.norm(shift), abs=1.5)
    assert found.overlap is not None
    assert (found.overlap > 0.97) == (shift == (0.0, 0.0, 0.0))


def test_missing_data_is_no_edge(tmp_path):
    values, hole = body(), np.zeros(SHAPE, dtype=bool)
    hole[:, :, :18] = True
    a = placed(tmp_path, "a", values)
    b = placed(tmp_path, "b", values, no_data=hole)
    found = measure(PairTask(tmp_path, a, b))
    assert found.offset_mm == 0.0
    assert found.overlap == pytest.approx(1.0, abs=0.02)


def test_scans_that_share_nothing_are_not_measured(tmp_path):
    a = placed(tmp_path, "a", body())
    b = placed(tmp_path, "b", body(), shift_mm=(0.0, 95.0, 0.0))
    assert measure(PairTask(tmp_path, a, b)) == Alignment(None, None)


def test_only_shared_frames_are_measured_and_measures_are_kept(tmp_path):
    rows = [scan_row(key, SHAPE) for key in "abc"]
    pairs = [
        PairRow(scan_a="a", scan_b="b", relation="same_frame"),
        PairRow(scan_a="a", scan_b="c", relation="same_study"),
    ]
    tasks = pairs_to_measure(pairs, rows, {}, archive=tmp_path)
    assert [(t.scan_a.key, t.scan_b.key) for t in tasks] == [("a", "b")]
    done = with_measures(pairs, {frozenset("ab"): Alignment(0.9, 3.0), frozenset("ac"): Alignment(0.1, 9.0)})
    assert [(p.overlap, p.offset_mm) for p in done] == [(0.9, 3.0), (None, None)]
    old = {row.key: row for row in rows}
    known = measured_before(done, old=old, new=rows)
    assert known == {frozenset("ab"): Alignment(0.9, 3.0)}
    assert not pairs_to_measure(pairs, rows, known, archive=tmp_path)
    changed = [rows[0].model_copy(update={"content_hash": "new"}), *rows[1:]]
    assert not measured_before(done, old=old, new=changed)


@pytest.mark.realdata
def test_the_misregistered_sarcoma_shows(real_data, tmp_path):
    """STS_019 is off by 7 mm (its source says); STS_035 is fine."""
    from medseg_ssl.commandline import find_config
    from medseg_ssl.config import parse, read_yaml
    from medseg_ssl.data.archive import Archive
    from medseg_ssl.data.prepare import PrepareConfig, prepare

    root = tmp_path / "root"
    root.mkdir()
    for subject in ("STS_019", "STS_035"):
        for path in sorted((real_data / "sts_ct_pet_mr" / "common_grid").glob(f"{subject}_*")):
            (root / path.name).symlink_to(path)
    tree = {**read_yaml(find_config("sts", kind="prepare")), "split": {"test": 0, "development": 0}}
    archive = Archive.open(prepare(parse(PrepareConfig, tree), [root], tmp_path / "archive"))
    names = dict(
        line.rsplit("\n", 1)[0].split(",", 1)
        for line in (archive.path / "private" / "sources.csv").read_text().splitlines()
    )
    offset = {}
    for pair in archive.pairs:
        modalities = {archive.scans[key].modality for key in (pair.scan_a, pair.scan_b)}
        if modalities == {"CT", "MR"}:
            offset["STS_019" if "STS_019" in names[pair.scan_a] else "STS_035"] = pair.offset_mm
    assert offset["STS_019"] > 5
    assert offset["STS_035"] < 2
