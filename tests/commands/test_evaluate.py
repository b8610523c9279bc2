"""``evaluate``: rows in the contract's columns, keys only, and never over another result."""

import csv
import json

import numpy as np
import pytest

from finetune.evaluate import main
from medseg_ssl.analysis.label_efficiency import CASE_COLUMNS
from medseg_ssl.config import ConfigError, UserError
from medseg_ssl.inference.predictor import Predictor
from tests.browser import Page
from tests.evaluations.fakes import MemoryArchive, Threshold, bright_cube, card

BOX = (slice(4, 9), slice(3, 11), slice(5, 8))


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A segmenter file and an archive whose classes, test cases and answers are known; calls are counted."""
    archive = MemoryArchive(classes=("background", "bright", "never"))
    for i in range(3):
        volume = bright_cube((14, 13, 12), BOX)
        archive.add_scan(f"s{i}", volume, subject=f"p{i}")
        archive.add_case(f"c{i}", [f"s{i}"], (volume > 0).astype(np.uint8), known=(True, True, i != 1))
    archive.set_split(train=("p0",), test=("p1", "p2"))
    calls = []

    def load(path, **options):
        calls.append(options)
        return Predictor(Threshold(classes=3), card(classes=archive.classes))

    monkeypatch.setattr("medseg_ssl.data.archive.Archive.open", lambda path: archive)
    monkeypatch.setattr("medseg_ssl.inference.predictor.Predictor.load", load)
    (tmp_path / "segmenter.safetensors").write_bytes(b"weights")
    return tmp_path, calls


def run(folder, *more, out="out"):
    return main(
        [
            str(folder / "segmenter.safetensors"),
            str(folder / out),
            "--archive",
            str(folder / "archive"),
            *more,
        ]
    )


def test_cases_and_summary(world, capsys):
    folder, _ = world
    out = run(folder, "--task", "cubes", "--nsd-tolerance-mm", "1.5")
    with (out / "cases.csv").open(newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    assert tuple(reader.fieldnames) == CASE_COLUMNS
    assert [(r["case"], r["class"]) for r in rows] == [
        (c, k) for c in ("c1", "c2") for k in ("bright", "never")
    ]
    assert rows[0]["dice"] == "1"
    assert rows[0]["nsd_tolerance_mm"] == "1.5"
    assert (rows[0]["task"], rows[0]["target"], rows[0]["init"]) == ("cubes", "CT", "fake")
    assert rows[1]["dice"] == rows[3]["dice"] == ""
    summary = json.loads((out / "summary.json").read_text())
    assert summary["metrics"]["dice"] == {"mean": 1.0, "std": 0.0, "cases": 2}
    assert summary["cases"] == 2
    assert "bright" in capsys.readouterr().out
    for file in out.iterdir():
        assert str(folder) not in file.read_text()


def test_other_subset(world):
    folder, _ = world
    with (run(folder, "--subset", "train") / "cases.csv").open(newline="") as file:
        assert {row["case"] for row in csv.DictReader(file)} == {"c0"}


def test_a_segmenter_that_saw_who_is_scored_is_refused(world, monkeypatch):
    """It was fine-tuned with another split of this archive; its training subjects may still be looked at as such."""
    folder, _ = world
    entry = {"archive": "f" * 64, "split": "other", "sides": ["test"], "trained_on": ["train"]}
    described = card(classes=("background", "bright", "never"), checked_against=(entry,))
    predictor = Predictor(Threshold(classes=3), described)
    monkeypatch.setattr("medseg_ssl.inference.predictor.Predictor.load", lambda path, **_: predictor)
    with pytest.raises(
        ConfigError, match="it began with, was trained with the split 'other' of this archive"
    ):
        run(folder)
    assert not (folder / "out").exists()
    run(folder, "--subset", "train")


def test_what_a_card_cannot_tell_of_who_was_seen_is_a_condition(world, monkeypatch, capsys):
    folder, _ = world

    def told(out, *more, **described):
        made = card(classes=("background", "bright", "never"), **described)
        predictor = Predictor(Threshold(classes=3), made)
        monkeypatch.setattr("medseg_ssl.inference.predictor.Predictor.load", lambda path, **_: predictor)
        return json.loads((run(folder, *more, out=out) / "summary.json").read_text())["conditions"]

    unknown = (
        "The segmenter, or the encoder it began with: whether its pretraining saw scored subjects cannot be checked"
        " here."
    )
    assert told("outside", archive_fingerprint="another") == [unknown]
    assert unknown in " ".join(capsys.readouterr().out.split())
    assert told("train", "--subset", "train", archive_fingerprint="another") == []
    assert told("own", archive_fingerprint="f" * 64) == []
    checked = {"archive": "f" * 64, "split": "default", "sides": ["test"]}
    assert told("kept", archive_fingerprint="another", checked_against=(checked,)) == []


def test_a_second_run_finds_its_results_and_another_is_refused(world, capsys):
    folder, _ = world
    out = run(folder)
    before = (out / "cases.csv").stat().st_mtime_ns
    assert run(folder) == out
    assert "already holds" in capsys.readouterr().out
    assert (out / "cases.csv").stat().st_mtime_ns == before
    with pytest.raises(
        ConfigError, match=r"they differ in nsd_tolerance_mm: nsd_tolerance_mm 2.0 there, 3.0 here"
    ):
        run(folder, "--nsd-tolerance-mm", "3")
    (folder / "segmenter.safetensors").write_bytes(b"other weights")
    with pytest.raises(ConfigError, match="segmenter"):
        run(folder)


def test_an_interrupted_run_goes_on_in_its_folder(world):
    folder, _ = world
    out = run(folder)
    (out / "summary.json").unlink()
    run(folder)
    assert (out / "summary.json").is_file()


def test_a_folder_of_something_else_is_left_alone(world):
    folder, _ = world
    (folder / "out").mkdir()
    (folder / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds something else"):
        run(folder)
    assert [f.name for f in (folder / "out").iterdir()] == ["thesis.txt"]


def test_wrong_usage(world):
    folder, _ = world
    with pytest.raises(ConfigError, match="subset"):
        run(folder, "--subset", "tests")
    for tolerance in ("-1", "nan"):
        with pytest.raises(ConfigError, match="negative"):
            run(folder, "--nsd-tolerance-mm", tolerance)
    with pytest.raises(UserError, match="no labeled case in subset 'development'"):
        run(folder, "--subset", "development")
    assert not (folder / "out").exists()


def test_missing_modalities_are_scored_where_they_are_asked_for(world, monkeypatch):
    folder, _ = world
    with pytest.raises(ConfigError, match="needs a segmenter of several channels"):
        run(folder, "--missing-modalities", out="one")
    archive = MemoryArchive()
    volume = bright_cube((14, 13, 12), BOX)
    for i in range(3):
        for key in ("a", "b"):
            archive.add_scan(f"{key}{i}", volume, subject=f"p{i // 2}")
        archive.add_case(f"c{i}", [f"a{i}", f"b{i}"], (volume > 0).astype(np.uint8))
    archive.set_split(test=("p0", "p1"))
    predictor = Predictor(Threshold(above=0.2), card(channels_in=2, modalities=("CT", "CT")))
    monkeypatch.setattr("medseg_ssl.data.archive.Archive.open", lambda path: archive)
    monkeypatch.setattr("medseg_ssl.inference.predictor.Predictor.load", lambda path, **_: predictor)
    out = run(folder, "--missing-modalities", out="two")
    with (out / "missing.csv").open(newline="") as file:
        scores = list(csv.DictReader(file))
    assert {row["given"]: row["dice"] for row in scores} == {"CT0": "1", "CT1": "0", "CT0+CT1": "1"}
    assert len(scores) == 9
    with (out / "missing_modalities.csv").open(newline="") as file:
        table = {
            row["given"]: row
            for row in csv.DictReader(file)
            if (row["class"], row["metric"]) == ("mean over classes", "dice")
        }
    assert {given: row["difference"] for given, row in table.items()} == {
        "CT0": "0",
        "CT1": "-1",
        "CT0+CT1": "0",
    }
    assert {(row["subjects"], row["cases"], row["before"]) for row in table.values()} == {("2", "3", "1")}
    assert table["CT0+CT1"]["p_holm"] == ""
    (out / "missing_modalities.csv").unlink()
    monkeypatch.setattr("medseg_ssl.evaluations.missing_modalities.missing_rows", None)  # scored once
    run(folder, "--missing-modalities", out="two")
    assert (out / "missing_modalities.csv").is_file()


def test_tables_that_cannot_be_are_refused_before_the_work_all_at_once(world, monkeypatch):
    folder, _ = world
    predictor = Predictor(Threshold(classes=4), card(classes=("background", "bright", "never", "more")))
    monkeypatch.setattr("medseg_ssl.inference.predictor.Predictor.load", lambda path, **_: predictor)
    with pytest.raises(ConfigError) as error:
        run(folder, "--calibration", "--missing-modalities", "--by", "age", "--by", "case")
    for told in (
        "calibration compares equal classes: the segmenter knows background, bright, never, more",
        "needs a segmenter of several channels, this one takes CT alone",
        "--by 'age' is no column",
        "--by 'case' is no column",
    ):
        assert told in str(error.value)
    lacking = Predictor(Threshold(), card(classes=("background", "bright"), intensity={}))
    monkeypatch.setattr("medseg_ssl.inference.predictor.Predictor.load", lambda path, **_: lacking)
    with pytest.raises(UserError, match="has background, bright, never"):
        run(folder)
    assert not (folder / "out").exists()


def test_prepared_archive_of_turned_anisotropic_scans(tmp_path, monkeypatch):
    """Files -> prepare at another spacing -> evaluate: the threshold's answer is right on every label's own grid."""
    import nibabel as nib

    from medseg_ssl.data.archive import Archive
    from pretrain.prepare import main as prepare

    raw = tmp_path / "raw"
    raw.mkdir()
    rng = np.random.default_rng(0)
    for i, (order, signs) in enumerate(
        [((0, 1, 2), (-1, -1, 1)), ((2, 0, 1), (1, -1, -1)), ((1, 2, 0), (1, 1, 1))]
    ):
        shape = (34 + i, 41, 17)
        array = rng.normal(-100, 3, shape).astype(np.float32)
        array[8:26, 10:30, 5:13] = 100
        matrix = np.eye(4)
        matrix[:3, :3] = 0.0
        for axis, (ras, sign) in enumerate(zip(order, signs, strict=True)):
            matrix[ras, axis] = sign * (0.9, 1.0, 2.5)[axis]
        nib.save(nib.Nifti1Image(array, matrix), raw / f"p{i}_CT.nii.gz")
        nib.save(nib.Nifti1Image((array > 0).astype(np.uint8), matrix), raw / f"p{i}_label.nii.gz")
    recipe = (
        "source: {name: folder, pattern: '{subject}_{modality}.nii.gz', modalities: {CT: {modality: CT}},"
        " label_pattern: '{subject}_label.nii.gz', classes: {1: bright}}\n"
        "spacing_mm: [1.25, 1.25, 1.25]\nsplit: {seed: 0, test: 2, development: 0}\n"
    )
    (tmp_path / "recipe.yaml").write_text(recipe)
    archive = tmp_path / "archive"
    prepare(
        [
            "--config",
            str(tmp_path / "recipe.yaml"),
            "--root",
            str(raw),
            "--out",
            str(archive),
            "--workers",
            "1",
        ]
    )

    opened = Archive.open(archive)
    one = Predictor(Threshold(), card(classes=opened.classes, spacing_mm=(1.25,) * 3, crop_size=(24, 24, 24)))
    monkeypatch.setattr("medseg_ssl.inference.predictor.Predictor.load", lambda path, **options: one)
    (tmp_path / "s.safetensors").write_bytes(b"weights")
    out = main([str(tmp_path / "s.safetensors"), str(tmp_path / "out"), "--archive", str(archive)])
    with (out / "cases.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2
    # only voxels that straddle the box's faces may differ after the way there and back
    assert all(float(row["dice"]) > 0.95 for row in rows)
    assert all(float(row["hd95_mm"]) <= 2.5 for row in rows)


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_tables_beside_the_cases_come_later_once_and_go_on(world, monkeypatch):
    folder, _ = world
    out = run(folder)
    before = (out / "cases.csv").stat().st_mtime_ns
    assert "<h2>Robustness</h2>" not in (out / "report.html").read_text()
    run(folder, "--robustness", "--calibration", "--by", "modality")
    assert (out / "cases.csv").stat().st_mtime_ns == before
    table = rows_of(out / "robustness.csv")
    dice = [r for r in table if (r["class"], r["metric"]) == ("bright", "dice")]
    found = {(r["corruption"], r["severity"]): r for r in dice}
    assert found["undisturbed", "0"]["after"] == "1"
    assert found["missing_slices", "3"]["difference"].startswith("-0.")
    assert {r["measure"] for r in rows_of(out / "calibration.csv")} == {"ece", "brier", "overconfidence"}
    assert rows_of(out / "reliability.csv")
    page = (out / "report.html").read_text()
    assert all(f"<h2>{part}</h2>" in page for part in ("Robustness", "Calibration", "Subgroups"))
    group = rows_of(out / "subgroups.csv")[0]
    assert (group["group"], group["subjects"], group["small"]) == ("CT", "2", "yes")
    (out / "report.html").write_text("of an interrupted call")
    run(folder, "--robustness")
    assert (out / "report.html").read_text() == page, "nothing is left to score, but the page to write"
    whole = (out / "robustness.csv").read_text()
    (out / "robustness.csv").unlink()
    (out / "robustness_cases" / "blur-2.csv").unlink()
    kept = (out / "robustness_cases" / "noise-1.csv").stat().st_mtime_ns
    run(folder, "--robustness", "--by", "unit", "--by", "modality")
    assert (out / "robustness.csv").read_text() == whole
    assert (out / "robustness_cases" / "noise-1.csv").stat().st_mtime_ns == kept
    assert {r["by"] for r in rows_of(out / "subgroups.csv")} == {"modality", "unit"}
    for file in (*out.rglob("*.csv"), out / "report.html"):
        assert str(folder) not in file.read_text()


def test_a_column_that_names_people_makes_no_group(world):
    folder, _ = world
    for column in ("subject", "case", "age"):
        with pytest.raises(ConfigError, match=rf"--by '{column}' is no column to group by; known: contrast"):
            run(folder, "--by", column)
    assert not (folder / "out").exists()


@pytest.mark.slow
def test_the_page_opens_in_a_browser(world):
    folder, _ = world
    out = run(folder, "--robustness", "--calibration", "--by", "modality")
    with Page(out / "report.html", folder / "profile") as shown:
        assert shown.problems == []
        assert [a for a in shown.asked if not a.startswith(("file:", "data:", "blob:"))] == []
        heads = "[...document.querySelectorAll('h2')].map((h) => h.textContent)"
        assert {"Robustness", "Calibration", "Subgroups"} <= set(shown.run(heads))
        plots = "[...document.querySelectorAll('.js-plotly-plot')]"
        assert shown.run(f"{plots}.length") >= 1
        closed = "[...document.querySelectorAll('details')].filter((d) => !d.open)"
        count = shown.run(f"{closed}.length")
        if count:
            shown.run(f"{closed}[0].querySelector('summary').click()")
            assert shown.run(f"{closed}.length") == count - 1
        assert shown.problems == []
