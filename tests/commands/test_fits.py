"""A whole comparison with real networks, two steps each: pretraining, fits, scores, tables, and going on."""

import csv
import json
import shutil
from dataclasses import replace

import pytest
import yaml

from finetune import compare as command
from finetune import fits, labeling, looks, planning, report
from finetune import run as finetune
from medseg_ssl.analysis.label_efficiency import CASE_COLUMNS
from medseg_ssl.config import ConfigError, UserError
from medseg_ssl.data.archive import Archive
from medseg_ssl.train.interrupt import Interrupted
from tests.train.archives import write_archive

NETWORK = {"name": "resenc", "size": "tiny", "features": [4, 8, 8, 8]}
TREE = {
    "task": "balls",
    "budgets": [1, 2],
    "draws": 1,
    "inits": {
        "scratch": "scratch",
        "scratch_long": "scratch_long",
        "mae": {
            "pretrain": {
                "base": "mae",
                "encoder": NETWORK,
                "objective": {"size": [16, 16, 16]},
                "data": {"batch_size": 2},
                "train": {"steps": "2 steps", "accelerator": "cpu", "preview_every": None},
            }
        },
    },
    "finetune": {
        "base": "segmentation",
        "encoder": NETWORK,
        "objective": {"size": [16, 16, 16]},
        "train": {"steps": "2 steps", "accelerator": "cpu"},
        "transfer": {"decoder": True},
    },
    "wandb": {"mode": "disabled"},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """An archive, the config's file, and a finished comparison."""
    folder = tmp_path_factory.mktemp("fits")
    archive = write_archive(folder / "archive").path
    config = folder / "balls.yaml"
    config.write_text(yaml.safe_dump(TREE))
    words = [str(config), str(folder / "out"), "--archive", str(archive), "--workers", "1", "--quiet"]
    command.main(words)
    return folder, words


def test_the_tables_of_real_fits(world):
    folder, _ = world
    out = folder / "out"
    with (out / "cases.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == CASE_COLUMNS
    assert len(rows) == 3 * 2 * 2  # inits, budgets, test cases of one class
    assert {row["case"] for row in rows} == {"case-s6", "case-s7"}
    assert {row["source"] for row in rows if row["init"] == "mae"} == {"CT+MR"}
    assert {row["source"] for row in rows if row["init"] != "mae"} == {""}
    assert {row["target"] for row in rows} == {"CT"}
    assert all(0 <= float(row["dice"]) <= 1 for row in rows)
    steps = {}
    for init in TREE["inits"]:
        fit = out / "fits" / init / "b2" / "d0"
        steps[init] = yaml.safe_load((fit / "config.yaml").read_text())["train"]["steps"]
        inputs = json.loads((fit / "inputs.json").read_text())
        assert inputs["cases"].startswith("2 (")
        assert (inputs["encoder"] is None) == (init != "mae")
        assert not any((fit / name).exists() for name in fits.BULKY)
        assert (fit / fits.SLICES).is_file()
    assert steps == {"scratch": "2 steps", "scratch_long": "4 steps", "mae": "2 steps"}
    assert "100.0% of the decoder's" in (out / "fits" / "mae" / "b1" / "d0" / "audit.txt").read_text()
    page = (out / "report.html").read_text()
    assert str(folder) not in page
    assert "case with 1 label, draw 0" in page


def test_running_again_repeats_no_fit(world, monkeypatch):
    folder, words = world
    before = {p: p.stat().st_mtime_ns for p in folder.glob("out/fits/*/*/*/cases.csv")}
    monkeypatch.setattr(fits, "_fit", None)  # would fail
    command.main(words)
    assert {p: p.stat().st_mtime_ns for p in folder.glob("out/fits/*/*/*/cases.csv")} == before


def _raiser(error):
    def function(*_, **__):
        raise error

    return function


def test_a_fit_that_failed_leaves_its_traceback_until_it_succeeds(world, tmp_path, monkeypatch):
    folder, _ = world
    archive = Archive.open(folder / "archive")
    config = command.read_config(folder / "balls.yaml", [])
    config = config.model_copy(update={"inits": {"scratch": "scratch"}})
    (task, _) = planning.fit_tasks(
        config,
        tmp_path,
        archives=(archive.path, archive.path),
        folds=labeling.folds_of(config, archive, archive),
        encoders={},
        sources={},
        target="CT",
        pretraining_steps=0,
        network=None,
        keep=False,
    )
    score, fit = fits._score, fits._fit
    monkeypatch.setattr(fits, "_score", lambda *_, explained=None: 1 / 0)
    with pytest.raises(UserError, match="ZeroDivisionError: division by zero"):
        fits.fit_and_score(task)
    assert "ZeroDivisionError" in (task.folder / "error.txt").read_text()
    assert not task.finished
    # what a person can mend leaves its reason too, and so a fit that fails before its run folder is one
    for error in (UserError("loss is not finite"), ConfigError("crop size does not fit")):
        shutil.rmtree(task.folder)
        monkeypatch.setattr(fits, "_fit", _raiser(error))
        with pytest.raises(type(error), match=str(error)):
            fits.fit_and_score(task)
        assert str(error) in (task.folder / "error.txt").read_text()
    (task.folder / "error.txt").unlink()
    monkeypatch.setattr(fits, "_fit", _raiser(Interrupted(15)))
    with pytest.raises(Interrupted):
        fits.fit_and_score(task)
    assert not (task.folder / "error.txt").exists(), "it is still to be done"
    (task.folder / "error.txt").write_text("of an earlier try")
    monkeypatch.setattr(fits, "_score", score)
    monkeypatch.setattr(fits, "_fit", fit)
    fits.fit_and_score(replace(task, keep=True))
    assert task.finished
    assert not (task.folder / "error.txt").exists()
    assert (task.folder / "segmenter.safetensors").is_file()
    _killed_between_scores_and_clean_up(task, monkeypatch)


def _killed_between_scores_and_clean_up(task, monkeypatch):
    """The weights are still there, so the fit is not finished; the next try deletes them and fits nothing again."""
    scores = (task.folder / fits.DONE).read_bytes()
    for name in ("segmenter.safetensors", "last.ckpt"):
        assert (task.folder / name).is_file()
    (task.folder / fits.DONE).unlink()
    with monkeypatch.context() as patch:
        patch.setattr(fits, "remove_bulky", _raiser(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            fits.fit_and_score(task)
    assert not task.finished, "it would be passed over"
    monkeypatch.setattr(fits, "_fit", None)  # would fail
    looks.fit_and_keep(task, budget=task.budget, every_draw=False)
    assert (task.folder / fits.DONE).read_bytes() == scores
    assert [name for name in fits.BULKY if (task.folder / name).exists()] == ["segmenter.safetensors"]
    assert not (task.folder / fits.SCORED).exists()
    fits.fit_and_score(task)
    assert not any((task.folder / name).exists() for name in fits.BULKY)


TRUTH = '''
import numpy as np

from medseg_ssl.baselines.base import Baseline, BaselineConfig


class Truth(Baseline):
    """Knows the answer, and insists on labels of which a quarter is annotated."""

    class Config(BaselineConfig):
        share: float = 0.25

    def fit(self, archive, cases, *, seed):
        for case in cases:
            known = archive.original_label(case)[0] != 255
            assert np.all(known == known[:, :1, :1]), "whole slices"
            assert known[:, 0, 0].mean() == self.config.share
        assert not set(archive.split().test) & {archive.cases[case].subject for case in cases}

    def predict_cases(self, archive, cases):
        for case in cases:
            yield case, archive.original_label(case)[0]
'''


@pytest.mark.slow
def test_folds_of_part_labels_with_a_baseline_and_the_same_subset_by_finetune(world, tmp_path, monkeypatch):
    folder, _ = world
    (tmp_path / "baselines").mkdir()
    (tmp_path / "baselines" / "truth.py").write_text(TRUTH)
    monkeypatch.setenv("MEDSEG_SHELVES", str(tmp_path))
    monkeypatch.setattr(report, "comparison_page", lambda comparison: comparison.title)
    tree = {
        "task": "balls",
        "budgets": [2],
        "draws": 1,
        "folds": 2,
        "labels": {"slices": 0.25, "spread": "even"},
        "inits": {"truth": {"baseline": "truth"}, "scratch": "scratch"},
        "finetune": {**TREE["finetune"], "train": {"steps": "1 steps", "accelerator": "cpu"}},
        "wandb": {"mode": "disabled"},
    }
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump(tree, sort_keys=False))
    out, archive = tmp_path / "out", folder / "archive"
    command.main([str(config), str(out), "--archive", str(archive), "--workers", "1", "--quiet"])
    with (out / "cases.csv").open() as file:
        rows = list(csv.DictReader(file))
    # the four training and two test subjects, once each; scored with their whole labels
    for init in ("truth", "scratch"):
        assert sorted(r["case"] for r in rows if r["init"] == init) == [
            f"case-s{i}" for i in (0, 1, 2, 3, 6, 7)
        ]
    assert {r["dice"] for r in rows if r["init"] == "truth"} == {"1"}
    assert not {r["dice"] for r in rows if r["init"] == "scratch"} & {"1", ""}
    summary = json.loads((out / "summary.json").read_text())
    assert "2 labels: 10 of 40 axial slices labeled" in " ".join(summary["conditions"])
    assert summary["baselines"] == ["scratch"]

    tuned = tmp_path / "c_finetune.yaml"
    fit = out / "fits" / "scratch" / "b2" / "d0f1"
    tuned.write_text((fit / "config.yaml").read_text())
    words = ["--archive", str(archive), "--cases", str(out / "budgets.json"), "--quiet"]
    finetune.main([str(tuned), str(tmp_path / "run"), *words, "--budget", "2", "--fold", "1"])
    ours, theirs = (json.loads((run / "inputs.json").read_text()) for run in (tmp_path / "run", fit))
    assert ours == theirs
    assert {"splits", "labels"} <= ours.keys()
    for wrong, message in (
        ([*words], "--cases needs --budget"),
        ([*words, "--budget", "3"], "budgets budgets.json have no budget 3 in draw 0; known: 2"),
        (["--archive", str(archive), "--budget", "3"], "--budget needs --cases"),
        ([*words, "--budget", "2", "data.split=other"], "is of split 'default', data.split is 'other'"),
    ):
        with pytest.raises(ConfigError, match=message):
            finetune.main([str(tuned), str(tmp_path / "run2"), *wrong])
