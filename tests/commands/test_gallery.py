"""The report of a folder with volumes: every part is there, the limit holds, and nothing tells a path."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from finetune import report
from finetune.comparison_tables import write_comparison
from finetune.gallery import Gallery
from finetune.volumes import PREDICTIONS, VOLUMES, Keeper, case_volume
from medseg_ssl.analysis import volumes as vol
from medseg_ssl.analysis.cases import case_scores
from medseg_ssl.analysis.label_efficiency import read_cases
from medseg_ssl.analysis.volumes import Predictions, read_volume
from medseg_ssl.data.archive_writer import ArchiveWriter
from medseg_ssl.data.manifest import CaseRow, Split
from medseg_ssl.data.store import write_label, write_volume
from tests.data.small_archive import RECIPE, scan_row

from .fake_folder import write_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("gallery") / "out", draws=2, cases=4)


@pytest.fixture(scope="module")
def gallery(folder):
    rows = [row for file in folder.glob("fits/*/*/*/cases.csv") for row in read_cases(file)]
    inits = ["scratch", "scratch_long", "mae"]
    return Gallery(folder, rows, inits=inits, scores=case_scores(rows))


def test_the_page_has_every_part_and_no_path(folder):
    write_comparison(folder)
    page = (folder / "report.html").read_text()
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    for part in ("Two inits, case by case", "Worst cases first", "Slices", "Example slices", "Failures"):
        assert part in headings
    assert "What the networks are sensitive to" in headings
    assert str(folder.parent) not in page
    assert "anterior <b>" not in re.sub(r"<script>.*?</script>", "", page, flags=re.S)
    assert "draw 1, 4 labels: 4001" in page
    assert "torch" in page.split("How to make this again")[-1]


def test_failures_are_the_lowest_of_each_init_with_their_reasons(gallery):
    rows = gallery.failures()
    lowest, second = rows.values()
    assert [p.caption.split(":")[0] for p in lowest] == ["scratch", "scratch_long", "mae"]
    for first, other in zip(lowest, second, strict=True):
        dice = [float(re.findall(r"Dice ([\d.]+)", p.caption)[0]) for p in (first, other)]
        assert dice[0] <= dice[1]
    assert any(" ml" in p.caption for p in lowest)


def test_the_viewer_holds_worst_median_and_best_and_explained_cases(gallery):
    found = gallery.viewer(limit_bytes=10**8)
    trees = [json.loads(tree) for _, tree in found.cases]
    assert [t["heading"].split(":")[0] for t in trees][:3] == ["Worst case", "Median case", "Best case"]
    fits = {(f["init"], f["budget"]) for f in trees[0]["fits"]}
    assert fits == {(i, b) for i in ("scratch", "scratch_long", "mae") for b in (1, 4)}
    means = {f["init"]: f["dice"]["mean"] for f in trees[0]["fits"] if f["budget"] == 1}
    average = sum(means.values()) / 3
    for tree in trees[1:3]:
        others = [f["dice"]["mean"] for f in tree["fits"] if f["budget"] == 1]
        assert sum(others) / 3 >= average
    tight = gallery.viewer(limit_bytes=len(found.cases[0][1]) + 10)
    assert len(tight.cases) == 1
    assert tight.left_out


def test_a_class_that_nobody_stated_is_no_failure(tmp_path, monkeypatch):
    """Slice 2 holds most of a class without a truth, slice 5 a little that is wrong: 5 is shown."""
    out = write_folder(tmp_path / "out", inits=("scratch", "mae"), budgets=(1,), draws=1, cases=1)
    (file,) = (out / VOLUMES).iterdir()
    volume = read_volume(file)
    truth = np.where(volume.truth_DHW == 2, 2, 0).astype(np.uint8)
    volume = replace(volume, truth_DHW=truth, known=(True, False, True))
    vol.write_volume(file, volume)
    said = truth.copy()
    said[2, :4, :4] = 1
    said[5, :1, :2] = 2
    for init in ("scratch", "mae"):
        kept = {volume.case: vol.CasePrediction(said, 0.0)}
        vol.write_predictions(out / "fits" / init / "b1" / "d0" / PREDICTIONS, kept)
    shown = []
    monkeypatch.setattr("medseg_ssl.analysis.pictures.contour_png", lambda s: shown.append(s) or b"png")
    rows = [row for file in out.glob("fits/*/*/*/cases.csv") for row in read_cases(file)]
    found = Gallery(out, rows, inits=["scratch", "mae"], scores=case_scores(rows)).failures()
    assert [np.array_equal(s.prediction_HW, said[5]) for s in shown] == [True, True]
    captions = [picture.caption for row in found.values() for picture in row]
    assert all(caption.endswith("; nobody stated anterior <b> here") for caption in captions)


def test_older_folders_without_volumes_have_a_page(tmp_path):
    out = write_folder(tmp_path / "out", draws=1, cases=3, budgets=(1,), volumes=False)
    write_comparison(out)
    headings = re.findall(r"<h2>(.*?)</h2>", (out / "report.html").read_text())
    assert "Slices" not in headings
    assert "Failures" in headings


def test_a_broken_transfer_folder_is_refused(tmp_path, folder):
    transfer = tmp_path / "transfer"
    (transfer / "targets").mkdir(parents=True)
    (transfer / "targets" / "CT").symlink_to(folder)
    (transfer / "matrix.csv").write_text("task\n")
    (transfer / "plan.json").write_text("{}")
    with pytest.raises(
        report.UserError, match=r"holds no transfer benchmark \(plan\.json is missing or broken"
    ):
        report.main([str(transfer), "--out", str(tmp_path / "all.html")])


# -- volumes of an archive -------------------------------------------------------------------------------------------

SHAPE = (12, 16, 20)
SPACING = (3.0, 1.0, 2.0)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """One case of CT and MR; the MR lies on a finer grid that is moved by half a voxel of the label's."""
    path = tmp_path_factory.mktemp("volumes") / "archive"
    writer = ArchiveWriter.open(path, RECIPE, ("background", "organ", "unstated"))
    z, y, x = np.indices(SHAPE)
    ct = 10.0 * z + y - 5.0 * x
    first = scan_row("ct", SHAPE, modality="CT", spacing_mm=SPACING)
    affine = np.array(first.affine_44)
    fine = affine.copy()
    fine[:3, :3] /= 2
    fine[:3, 3] += affine[:3, :3] @ np.full(3, -0.25)
    z2, y2, x2 = np.indices(tuple(2 * n for n in SHAPE))
    mr = np.round(100 + 10.0 * (z2 / 2 - 0.25) + (y2 / 2 - 0.25) + 3 * (x2 / 2 - 0.25))
    second = scan_row("mr", mr.shape, modality="MR", affine_44=fine, spacing_mm=np.divide(SPACING, 2))
    for row, array in ((first, ct), (second, mr)):
        write_volume(path, array.astype(np.int16), row, recipe=RECIPE, stamp="")
    label = np.zeros(SHAPE, np.uint8)
    label[7:10, 9:13, 2:6] = 1  # superior, anterior, at the patient's left
    write_label(path, "c", label, original_DHW=label, original_affine_44=affine, recipe=RECIPE, stamp="")
    known = (True, True, False)
    case = CaseRow(case="c", subject="s0", scans=("ct", "mr"), labeled=True, known_classes=known)
    split = Split(name="default", seed=0, train=(), development=(), test=("s0",))
    return writer.commit([first, second], [case], [], splits=[split]), ct, label


def test_every_scan_lies_on_the_label_in_physical_units(archive):
    opened, ct, label = archive
    volume = case_volume(opened, "c")
    assert volume.spacing_mm == SPACING
    np.testing.assert_array_equal(volume.truth_DHW, volume.box.cut(label))
    np.testing.assert_array_equal(volume.truth_DHW.nonzero()[0].min() + volume.box.start[0], 7)
    assert [c.name for c in volume.channels] == ["CT", "MR"]
    shown = volume.channels[0].values_256[volume.channels[0].image_DHW]
    assert np.abs(shown - volume.box.cut(ct)).max() <= 5 / 3 + 1e-6
    # both scans are ramps over the same places, so the finer one must read the same ramp on the label's grid
    mr = volume.channels[1]
    z, y, x = np.indices(SHAPE)
    expected = volume.box.cut(100 + 10.0 * z + y + 3.0 * x)
    inner = (slice(1, -1),) * 3
    step = np.diff(mr.values_256).max()
    assert np.abs(mr.values_256[mr.image_DHW] - expected)[inner].max() <= step / 2 + 1.0
    assert volume.truth_ml[1] == pytest.approx(3 * 4 * 4 * 6 / 1000)
    assert (volume.known, volume.unstated) == ((True, True, False), ("unstated",))


def test_a_thinned_volume_shows_the_same_places(archive):
    opened, ct, _ = archive
    volume = case_volume(opened, "c", voxels=2 * 200)
    assert volume.truth_DHW.size <= 200
    middle = [
        slice(a + (s - 1) // 2, None, s) for a, s in zip(volume.box.start, volume.box.step, strict=True)
    ]
    expected = ct[tuple(middle)][tuple(slice(n) for n in volume.box.shape)]
    shown = volume.channels[0].values_256[volume.channels[0].image_DHW]
    # a ramp stays a ramp under the low-pass, but for the edges
    assert np.abs(shown - expected)[1:-1, 1:-1, 1:-1].max() <= 5 / 3 + 1e-6


def test_a_fit_keeps_its_predictions_and_the_first_one_the_volume(archive, tmp_path):
    opened, _, label = archive
    fits = [tmp_path / "out" / "fits" / name / "b1" / "d0" for name in ("scratch", "mae")]
    moved = np.roll(label, 1, axis=2)
    for fit in fits:
        keeper = Keeper(fit, opened, test_cases=["c"])
        keeper.add("c", moved)
        keeper.write()
    (file,) = (tmp_path / "out" / VOLUMES).iterdir()
    volume, opened_fit = read_volume(file), Predictions.open(fits[1] / PREDICTIONS)
    np.testing.assert_array_equal(opened_fit.read("c").label_DHW, volume.box.cut(moved))
    assert opened_fit.explained == ()
