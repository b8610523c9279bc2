"""Transfer: the matrix from the tables of its comparisons, restarts that change nothing, wrong inputs named."""

import csv
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from finetune import looks, mirror, report, transfer_tables
from finetune import matrix as plans
from finetune import matrix_planning as planning
from finetune import transfer as command
from finetune.matrix import MatrixConfig
from finetune.transfer_tables import write_transfer
from medseg_ssl.analysis.statistics import paired_interval
from medseg_ssl.analysis.tables import write_csv, write_text
from medseg_ssl.analysis.transfer import Target
from medseg_ssl.cli import locate
from medseg_ssl.config import ConfigError, UserError, parse, to_yaml
from medseg_ssl.data.archive import Archive
from medseg_ssl.evaluations import missing_modalities
from medseg_ssl.inference.predictor import Predictor
from medseg_ssl.train.interrupt import Interrupted
from medseg_ssl.train.settings import WandbConfig
from tests.evaluations.fakes import Threshold, card
from tests.train import offline
from tests.train.archives import TEST, write_archive

from . import fake_transfer as fakes

ROOT = Path(__file__).parents[2]
TABLES = ("cases.csv", "curve.csv", "matrix.csv", "summary.json", "matrix.png", "report.html")


def run(out, *, config=None, fit=fakes.fake_fit, archives=fakes.ARCHIVES, **options):
    return command.transfer(
        config or fakes.config(),
        out,
        archives=archives,
        workers=1,
        quiet=True,
        fit=fit,
        pretrain=fakes.fake_pretrain,
        **options,
    )


@pytest.fixture
def stand_ins(monkeypatch):
    fakes.use_fakes(monkeypatch.setattr)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A benchmark that ran through without interruption."""
    with pytest.MonkeyPatch.context() as patch:
        fakes.use_fakes(patch.setattr)
        out = tmp_path_factory.mktemp("finished") / "out"
        run(out)
    return out


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_matrix_holds_what_the_cases_say(finished):
    cases, matrix = rows_of(finished / "cases.csv"), rows_of(finished / "matrix.csv")
    assert len(cases) == 2 * 5 * 2 * 2 * 5  # targets, inits, budgets, draws, test cases
    assert {row["source"] for row in cases} == {"", "CT", "MR", "CT+MR"}
    assert len(matrix) == 3 * 2 * 2 * 6

    def dice(init):
        table = np.zeros((5, 2))
        for row in cases:
            if (row["init"], row["target"], row["budget"]) == (init, "lesions", "2"):
                table[int(row["case"][1:]) - 6, int(row["draw"])] = float(row["dice"])
        return table

    baseline = max(("scratch", "scratch_long"), key=lambda name: dice(name).mean())
    by_hand = paired_interval(dice("CT"), dice(baseline))
    key = ("CT", "lesions", "2", "dice")
    (cell,) = [r for r in matrix if (r["source"], r["target"], r["budget"], r["metric"]) == key]
    assert float(cell["mean"]) == pytest.approx(dice("CT").mean(), abs=1e-6)
    found = [float(cell[name]) for name in ("gain", "gain_ci_low", "gain_ci_high")]
    assert found == pytest.approx([by_hand.mean, by_hand.low, by_hand.high], abs=1e-5)
    empty = [r for r in matrix if r["metric"] == "nsd"]
    assert {r["mean"] + r["gain"] for r in empty} == {""}


def test_summary_has_controls_asymmetry_and_mixed_gain(finished):
    summary = json.loads((finished / "summary.json").read_text())
    assert (summary["finished"], summary["planned"]) == (40, 40)
    (asymmetry,) = summary["asymmetry"]
    assert (asymmetry["there"], asymmetry["back"]) == (["CT", "lesions"], ["MR", "organs"])
    assert asymmetry["mean"] == pytest.approx(-0.02, abs=0.005)
    union = [m for m in summary["mixed"] if m["target"] == "lesions" and m["best"]]
    assert [(m["union"], m["single"]) for m in union] == [("CT+MR", "MR")]
    assert union[0]["mean"] == pytest.approx(0.02, abs=0.005)
    assert {c["kind"] for c in summary["cells"]} == {"same data", "other modality"}
    page = (finished / "report.html").read_text()
    assert "CT+MR → lesions against MR, its best single source" in page
    assert 'href="targets/lesions/report.html"' in page
    assert "Target organs: 5 scored cases of CT in archive organs at 3×1×2 mm" in page
    assert (finished / "targets" / "organs" / "report.html").is_file()


def test_every_source_is_pretrained_once_and_kept_from_test_subjects(tmp_path):
    tasks = {t.init: t for t in planning.pretrain_tasks(fakes.config(), tmp_path, fakes.ARCHIVES)}
    assert list(tasks) == ["CT", "MR", "CT+MR"]
    assert (tasks["CT"].archive, tasks["CT"].protect) == (Path("ct"), (Path("mr"),))
    both = tasks["CT+MR"]
    assert (both.archive, both.more, both.protect) == (Path("ct"), (Path("mr"),), ())
    assert both.config["data"]["modalities"] == [["CT"], ["MR"]]
    without = [{k: v for k, v in t.config.items() if k != "data"} for t in tasks.values()]
    assert all(tree == without[0] for tree in without)
    tuned = {
        t.init: t
        for t in planning.pretrain_tasks(fakes.config(subset="development"), tmp_path, fakes.ARCHIVES)
    }
    assert set(tuned["CT+MR"].protect) == {Path("ct"), Path("mr")}, (
        "a copy of who is scored in the other archive"
    )
    assert tuned["CT"].protect == (Path("mr"),)
    again = planning.pretrain_tasks(fakes.config(pretrainings=2), tmp_path, fakes.ARCHIVES)[3:]
    assert [(t.folder.name, t.pretraining, t.config["seed"]) for t in again] == [
        (f"{name}@p1", 1, 1) for name in tasks
    ]


@pytest.mark.usefixtures("stand_ins")
def test_pretrainings_are_the_third_level_and_what_stands_beside_is_no_source(tmp_path):
    targets = {
        **fakes.TREE["targets"],
        "lesions": {"archive": "lesions", "baselines": [{"baseline": "size_only"}]},
    }
    out = tmp_path / "out"
    run(out, config=fakes.config(pretrainings=2, budgets=[1], targets=targets, unions="none"))
    cases = rows_of(out / "cases.csv")
    found = {(r["target"], r["init"], r["source"], r["pretraining"]) for r in cases}
    scratch = {(t, i, "", "0") for t in ("organs", "lesions") for i in ("scratch", "scratch_long")}
    sources = {(t, i, i, p) for t in ("organs", "lesions") for i in ("CT", "MR") for p in "01"}
    assert found == scratch | sources | {("lesions", "size_only", "", "0")}
    assert {row["source"] for row in rows_of(out / "matrix.csv")} == {"CT", "MR"}
    summary = json.loads((out / "summary.json").read_text())
    assert summary["planned"] == summary["finished"] == (4 + 2) * 2 + (4 + 2 + 1) * 2
    assert {(c["pretrainings"], c["covers"]) for c in summary["cells"]} == {
        (2, "cases, draws and pretrainings")
    }
    assert [(b["beside"], b["init"], b["target"]) for b in summary["beside"]] == [
        ("size_only", init, "lesions") for init in ("CT", "MR", "scratch", "scratch_long")
    ]

    def dice(init, number):
        table = np.full((5, 2), np.nan)
        for row in cases:
            if (row["init"], row["target"], row["pretraining"]) == (init, "lesions", number):
                table[int(row["case"][1:]) - 6, int(row["draw"])] = float(row["dice"])
        return table

    by_hand = paired_interval(
        np.stack([dice("MR", n) for n in "01"], axis=-1), dice("size_only", "0")[..., None]
    )
    assert (summary["beside"][1]["mean"], summary["beside"][1]["low"]) == pytest.approx(
        (by_hand.mean, by_hand.low)
    )
    verdicts = " ".join(summary["verdicts"])
    assert "lesions: size_only alone reaches" in verdicts
    assert "One pretraining" not in verdicts
    assert "CT, MR: pretrained 2 times, with seeds that follow one another" in " ".join(summary["conditions"])
    page = (out / "report.html").read_text()
    assert "<td>size_only</td><td>beside</td>" in page
    assert "cases × draws × pretrainings" in page


def test_one_pretraining_per_source_is_said_in_words(finished):
    told = "One pretraining per source: differences between pretrainings are not in the intervals."
    assert json.loads((finished / "summary.json").read_text())["verdicts"][-1] == told
    assert told in (finished / "report.html").read_text()


def test_report_draws_the_page_of_the_benchmark(tmp_path, finished):
    """The same sections, without links to pages that lie elsewhere, and every target's comparison below."""
    both = report.main([str(finished), "--out", str(tmp_path / "all.html")]).read_text()
    own = (finished / "report.html").read_text()

    def sections(page):
        return {part.partition("</h2>")[0]: part for part in page.split("<section><h2>")[1:]}

    links = "Curves, examples and losses of each target"
    shown = [
        name
        for name in sections(own)
        if name not in (links, "Configs", "Conditions", "How to make this again")
    ]
    assert shown[:3] == ["Transfer matrix", "Gains over the better scratch baseline", "Dice on each target"]
    for name in shown:
        mine, theirs = sections(own)[name], sections(both)[name]
        assert mine.replace('id="matrix"', 'id="transfer0"') == theirs, name
    assert links not in both
    assert both.count("<h2>Label-efficiency curve</h2>") == 2
    assert both.count("<h2>Transfer matrix</h2>") == 1


@pytest.mark.usefixtures("stand_ins")
def test_interrupted_and_continued_gives_the_uninterrupted_tables(tmp_path, finished):
    def stop(task):
        if (task.target, task.draw, task.budget) == ("MR", 1, 1):
            raise KeyboardInterrupt
        return fakes.fake_fit(task)

    out = tmp_path / "out"
    with pytest.raises(Interrupted, match="run the same command again"):
        run(out, fit=stop)
    assert not (out / "matrix.csv").exists()
    command.main([str(out), "--report-only", "--quiet"])
    partial = json.loads((out / "summary.json").read_text())
    assert (partial["finished"], partial["planned"]) == (30, 40), (
        "also those of a target that was left in the middle"
    )
    assert "Unfinished: 30 of 40" in (out / "report.html").read_text()
    done = {p: p.stat().st_mtime_ns for p in out.rglob("fits/**/cases.csv")}
    run(out)
    assert all(path.stat().st_mtime_ns == when for path, when in done.items()), "finished fits were repeated"
    for name in TABLES:
        assert (out / name).read_bytes() == (finished / name).read_bytes(), name


@pytest.mark.slow
@pytest.mark.usefixtures("stand_ins")
def test_a_matrix_goes_to_the_mirror_once_and_whole(tmp_path, monkeypatch):
    def send(out, found, *, wandb, config, known_id):
        sends.append((known_id, len(found.matrix), config["task"]))
        if len(sends) == 1:
            raise KeyboardInterrupt

    def stop(task):
        if task.target == "MR":
            raise KeyboardInterrupt
        return fakes.fake_fit(task)

    sends, out = [], tmp_path / "out"
    config = fakes.config(wandb={"mode": "offline"}, budgets=[1], low_budgets=[1], draws=1)
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setattr(mirror, "send_comparison", lambda *given, **more: None)
    monkeypatch.setattr(mirror, "send_matrix", send)
    with pytest.raises(Interrupted):
        run(out, config=config, fit=stop)
    command.main([str(out), "--report-only", "--quiet"])
    assert sends == [], "a part is not sent"
    with pytest.raises(KeyboardInterrupt):
        run(out, config=config)
    command.main([str(out), "--report-only", "--quiet"])
    run(out, config=config)
    assert sends == [sends[0]] * 2, "cut off and sent again, as the same run"
    assert sends[0][1:] == (len(rows_of(out / "matrix.csv")), config.task)


@pytest.mark.slow
def test_the_matrix_and_its_curves_stand_in_the_offline_run(tmp_path, finished, monkeypatch):
    for name in ("WANDB_MODE", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    (out / "pretrain" / "CT+MR").mkdir(parents=True, exist_ok=True)
    (out / "pretrain" / "CT+MR" / "encoder.safetensors").write_bytes(b"weights")
    found = write_transfer(out)
    mirror.send_matrix(out, found, wandb=WandbConfig(), config={"task": "fake"})
    recorded = offline.records(out)
    history = offline.history(recorded)
    names = ("tables/matrix", "tables/curve", "tables/gains", "tables/verdicts")
    charts = ("charts/transfer_matrix", "charts/label_efficiency/organs", "charts/label_efficiency/lesions")
    assert {*names, *charts} <= set(history)
    (files,) = (out / "wandb").glob("offline-run-*/files")
    table = json.loads((files / history["tables/matrix"]["path"]).read_text())
    gains = [row[table["columns"].index("gain")] for row in table["data"]]
    assert gains == pytest.approx([row["gain"] for row in found.matrix], nan_ok=True)
    for name in ("controls", "asymmetry", "mixed"):
        told = json.loads((files / history[f"tables/{name}"]["path"]).read_text())
        means = [row[told["columns"].index("mean")] for row in told["data"]]
        assert means == pytest.approx([item["mean"] for item in found.page.summary[name]])
    chart = json.loads((files / history["charts/transfer_matrix"]["path"]).read_text())
    assert chart["data"][0]["x"] == ["CT", "MR", "CT+MR"]
    (group,) = {r.run.run_group for r in recorded if r.WhichOneof("record_type") == "run"}
    assert group == mirror.group_in(out), "the group of its pretrainings"
    artifacts = {
        r.artifact.name: r.artifact.type for r in recorded if r.WhichOneof("record_type") == "artifact"
    }
    own = {name: kind for name, kind in artifacts.items() if name.startswith("fake-")}
    kinds = {"fake-CT", "fake-MR", "fake-CT_MR"}, {"fake-lesions-budgets", "fake-organs-budgets"}
    assert own == dict.fromkeys(kinds[0], "encoder") | dict.fromkeys(kinds[1], "budgets")


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.slow
def test_killed_and_continued_gives_the_uninterrupted_tables(tmp_path, finished):
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.commands.fake_transfer", str(out)], cwd=ROOT, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while len(list(out.glob("targets/lesions/fits/*/*/*/cases.csv"))) < 3:
        assert process.poll() is None, "the benchmark ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait(timeout=30)
    run(out)
    for name in TABLES:
        assert (out / name).read_bytes() == (finished / name).read_bytes(), name


@pytest.mark.slow
@pytest.mark.usefixtures("stand_ins")
def test_a_cluster_gives_the_same_tables(tmp_path, finished, monkeypatch):
    pytest.importorskip("ray", reason="the extra 'cluster' (ray) is not installed")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    run(tmp_path / "out", engine="ray")
    for name in TABLES:
        assert (tmp_path / "out" / name).read_bytes() == (finished / name).read_bytes(), name


@pytest.mark.usefixtures("stand_ins")
def test_a_failed_fit_leaves_the_other_target(tmp_path):
    def fail(task):
        if task.target == "CT" and task.init == "MR":
            write_text(task.folder / "error.txt", "no space left")
            raise UserError("no space left")
        return fakes.fake_fit(task)

    with pytest.raises(
        UserError, match="target organs: 2 fits failed, the first is MR, 1 labels, draw 0: no space"
    ):
        run(tmp_path / "out", fit=fail, config=fakes.config(budgets=[1], baselines=["scratch"]))
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert {c["target"] for c in summary["cells"]} >= {"lesions"}
    assert summary["finished"] < summary["planned"]
    told = r"Target organs: 2 of \d+ fits failed and are missing: MR with 1 label, draw 0; MR with 1 label, draw 1\. "
    assert re.match(told, summary["conditions"][-1])


def test_missing_channels_are_scored_as_the_fit_was(tmp_path, monkeypatch):
    """With its flips, in its precision, on its device; the comparison's own scores are made by the same function."""
    asked = []
    predictor = Predictor(
        Threshold(), card(modalities=("CT", "MR"), channels_in=2, mirror_axes=(2,)), flips=True
    )

    def load(path, **options):
        asked.append((path.name, options))
        return predictor

    monkeypatch.setattr(Predictor, "load", load)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(Archive, "open", lambda path: SimpleNamespace(limited=lambda access: None))
    scored = []
    monkeypatch.setattr(missing_modalities, "evaluate_cases", lambda p, *_, **__: scored.append(p) or [])
    train = {"accelerator": "auto", "precision": "bf16"}
    shared = (Path("archive"), Path("kept.safetensors"), ("c",), "scratch", 1, 0, 2.0)
    looks.score_missing(looks.MissingTask(tmp_path / "a.csv", "t", *shared, train, True))
    looks.score_missing(
        looks.MissingTask(tmp_path / "b.csv", "t", *shared, {**train, "accelerator": "cpu"}, False)
    )
    looks.score_missing(
        looks.MissingTask(
            tmp_path / "c.csv", "t", *shared, {**train, "accelerator": "cpu"}, False, precision="bf16"
        )
    )
    assert asked == [
        ("kept.safetensors", {"device": "cuda", "precision": "bf16", "flips": True}),
        ("kept.safetensors", {"device": "cpu", "precision": "fp32", "flips": False}),
        ("kept.safetensors", {"device": "cpu", "precision": "bf16", "flips": False}),
    ]
    assert [p._flips for p in scored] == [predictor._flips] * 9, "every subset keeps them"
    assert len(predictor._flips) == 2


def test_missing_channels_are_counted_by_subject(tmp_path):
    """Two scans of each of three subjects: the interval is that of three."""
    dice = {"c0": 0.5, "c1": 0.5, "c2": 0.7, "c3": 0.7, "c4": 0.6, "c5": 0.6}
    head = {"target": "t", "init": "scratch", "budget": 1, "draw": 0, "pretraining": 0}
    head |= {"given": "CT", "class": "organ"}
    rows = [{**head, "case": case, "dice": value} for case, value in dice.items()]
    subjects = {case: f"s{int(case[1:]) // 2}" for case in dice}
    found = {}
    for name, kept in (("pairs", rows), ("single", rows[::2])):
        write_csv(tmp_path / name / "features/t/missing/a.csv", kept, columns=looks.MISSING_COLUMNS)
        another = [{**row, "init": "unet"} for row in kept]
        write_csv(tmp_path / name / "features/t/missing/b.csv", another, columns=looks.MISSING_COLUMNS)
        target = Target("t", "a", ("CT", "MR"), (1,), ("scratch",), subjects, beside=("unet",))
        (found[name], beside, _, _) = transfer_tables._missing(tmp_path / name, "task", [target], [])
        assert beside["init"] == "unet"
    assert found["pairs"] == found["single"]
    assert found["pairs"]["cases"] == 3


@pytest.mark.usefixtures("stand_ins")
def test_budgets_of_another_run_are_labeled_again(tmp_path, finished):
    """The file of one target, under another seed; the other target draws its own."""
    config = fakes.config(seed=5, unions="none", budgets=[2], low_budgets=[2], draws=1)
    given = finished / "targets" / "organs" / "budgets.json"
    for name, budgets in (("own", {}), ("again", {"organs": given})):
        run(tmp_path / name, config=config, budgets=budgets)

    def subsets(out, target):
        return json.loads((out / "targets" / target / "plan.json").read_text())["subsets"]["0"]["2"]

    assert subsets(tmp_path / "again", "organs") == subsets(finished, "organs")
    assert subsets(tmp_path / "own", "organs") != subsets(finished, "organs")
    assert subsets(tmp_path / "again", "lesions") == subsets(tmp_path / "own", "lesions")
    with pytest.raises(ConfigError, match="another"):
        run(tmp_path / "own", config=config, budgets={"organs": given})
    with pytest.raises(ConfigError, match=r"--budgets organ=… is not in the config; known: organs, lesions"):
        run(tmp_path / "none", config=config, budgets={"organ": given})
    with pytest.raises(ConfigError, match=r"targets\.lesions: .*budgets"):
        run(tmp_path / "none", config=config, budgets={"lesions": given})
    assert not (tmp_path / "none").exists()


@pytest.mark.usefixtures("stand_ins")
def test_an_encoder_that_was_chosen_says_so_and_has_cost_all_its_steps(tmp_path):
    chosen = {"score": "knn/dice", "subset": "development", "step": 2, "of_steps": 400, "candidates": 5}
    of_source = fakes.card(write_text(tmp_path / "encoder.safetensors", "CT"))
    card = SimpleNamespace(**{**vars(of_source), "steps": 2, "chosen_by": chosen})
    config = fakes.config(
        archives=["balls"],
        sources={"CT": {"archives": {"balls": ["CT"]}}},
        targets={"balls": {"archive": "balls"}},
    )
    told = planning.notes_of(config, {"balls": fakes.archive(tmp_path / "ct")}, {"CT": card}, [])
    assert any(note.startswith("CT: ") and ", 400 steps at " in note for note in told)
    made = planning.pretrain_tasks(config, tmp_path, {"balls": tmp_path})
    assert [task.wandb for task in made] == [config.wandb]
    assert "CT: these weights were chosen among 5 by knn/dice on development subjects; labels that this evaluation" \
        " reads are not counted in the budgets." in told  # fmt: skip


@pytest.mark.usefixtures("stand_ins")
def test_subjects_whose_scans_cannot_be_joined_are_counted(tmp_path):
    """Of two test subjects one lost its pair: it is not scored, and the page says so."""
    archive = write_archive(tmp_path / "archive")
    lonely = archive.split("default").test[0]
    pairs = [pair for pair in archive.pairs if lonely not in pair.scan_a]
    told = {}
    for name, some in (("whole", archive.pairs), ("less", pairs)):
        archive.pairs = some
        config = fakes.config(
            archives=["balls"],
            sources={"CT": {"archives": {"balls": ["CT"]}}},
            targets={"both": {"archive": "balls", "modalities": ["CT", "MR"]}},
        )
        target = planning.target_of(config, "both", {"balls": archive})
        conditions = planning.notes_of(config, {"balls": archive}, {}, [target])
        told[name] = (len(target.facts.subjects), [note for note in conditions if "left out" in note])
    scored, trained = len(archive.split("default").test), len(archive.split("default").train)
    assert told["whole"] == (scored, [])
    assert told["less"][0] == scored - 1
    assert told["less"][1] == [
        f"Target both: 1 of {scored + trained} labeled cases of CT are left out, having not exactly one scan of MR each"
        " on their coordinates."
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("stand_ins")
def test_targets_may_ask_what_a_comparison_can(tmp_path):
    """Shares of a target's cases, balanced subsets, labels known in part; numbers stand in every table."""
    asked = {"budgets": [2, "50%"], "low_budgets": ["50%"], "draws": 4, "stratify": {"by": "scanner"}}
    targets = {
        "organs": {"archive": "organs", **asked, "labels": {"slices": 0.5}},
        "lesions": {"archive": "lesions", "modalities": ["MR"]},
    }
    seen = []

    def fit(task):
        seen.append(task)
        return fakes.fake_fit(task)

    out = tmp_path / "out"
    run(out, config=fakes.config(targets=targets), fit=fit)
    organs = [task for task in seen if "targets/organs" in task.folder.as_posix()]
    assert {(task.budget, len(task.train_cases)) for task in organs} == {(2, 2), (3, 3)}
    assert {sum(int(case[1:]) % 2 for case in t.train_cases) for t in organs if t.budget == 2} == {1}
    assert all(set(task.access.labels) == set(task.train_cases) for task in organs)
    summary = json.loads((out / "summary.json").read_text())
    assert {tuple(c["budgets"]) for c in summary["cells"] if c["target"] == "organs"} == {(3,)}
    for told in (
        "Target organs: Budget 50% is 3 of 6 labeled training cases.",
        "Target organs: the subsets are balanced by scanner.",
        "Target organs: of each drawn label 50% of the slices (random) are known.",
    ):
        assert told in summary["conditions"]
    again = {path: path.read_bytes() for path in (out / "matrix.csv", out / "cases.csv")}
    run(out, config=fakes.config(targets=targets), fit=fit)
    assert again == {path: path.read_bytes() for path in again}


@pytest.mark.slow
@pytest.mark.usefixtures("stand_ins")
def test_what_was_pooled_is_named_as_it_was(tmp_path, finished):
    """Low budgets that were not fitted pool nothing: then all budgets are pooled, and no word calls them few."""
    out = tmp_path / "out"
    run(out, config=fakes.config(budgets=[1, 3], low_budgets=[2]))
    summary = json.loads((out / "summary.json").read_text())
    assert {tuple(c["budgets"]) for c in summary["cells"]} == {(1, 3)}
    assert any(
        line.startswith("Against the better scratch baseline, over 1 and 3 labels, ")
        for line in summary["verdicts"]
    )
    assert any("pooled over the budgets 1, 3 where" in note for note in summary["conditions"])
    assert "few labels" not in (out / "report.html").read_text()
    usual = json.loads((finished / "summary.json").read_text())["verdicts"]
    assert any("over 1 and 2 labels" in line for line in usual)


@pytest.mark.usefixtures("stand_ins")
def test_another_config_is_refused(tmp_path, finished):
    with pytest.raises(ConfigError, match="seed: 0 -> 1"):
        run(finished, config=fakes.config(seed=1))


@pytest.mark.slow
@pytest.mark.usefixtures("stand_ins")
def test_a_fit_that_is_asked_for_again_keeps_what_is_looked_at(tmp_path):
    """A worker may die between its scores and their delivery: the retry finds a finished fit."""
    tasks = []
    run(
        tmp_path,
        config=fakes.config(budgets=[1, 2]),
        fit=lambda task: (tasks.append(task), fakes.fake_fit(task))[1],
    )
    for task in tasks:
        for name in (looks.SEGMENTER, "last.ckpt"):
            (task.folder / name).write_bytes(b"weights")
        assert looks.fit_and_keep(task, budget=2, every_draw=False) == task.folder / "cases.csv"
        kept = (task.folder / looks.SEGMENTER).is_file()
        assert kept == ((task.budget, task.draw) == (2, 0))
        assert not (task.folder / "last.ckpt").exists()


# -- wrong inputs ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("stand_ins")
def test_archives_and_encoders_go_with_their_names(tmp_path):
    with pytest.raises(ConfigError, match="archive 'lesions' needs its path: --archive lesions=PATH"):
        run(tmp_path / "out", archives={"organs": Path("ct")})
    with pytest.raises(
        ConfigError, match=r"archive 'organs' needs its path: .*; archive 'lesions' needs its path"
    ):
        run(tmp_path / "out", archives={})
    with pytest.raises(ConfigError, match=r"--archive liver=… is not in the config; known: organs, lesions"):
        run(tmp_path / "out", archives={**fakes.ARCHIVES, "liver": Path("x")})
    few = {"budgets": [1], "baselines": ["scratch"], "targets": {"organs": {"archive": "organs"}}}
    given = fakes.config(sources={**fakes.TREE["sources"], "file": "encoder"}, unions="none", **few)
    with pytest.raises(ConfigError, match="encoder 'file' needs its path: --encoder file=PATH"):
        run(tmp_path / "out", config=given)
    (tmp_path / "file").write_text("PT")
    run(tmp_path / "out", config=given, encoders={"file": tmp_path / "file"})
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert {c["kind"] for c in summary["cells"] if c["source"] == "file"} == {"unknown"}
    assert summary["conditions"][0].startswith(
        "CT, MR: pretrained with the same network, steps and batch; file: as the files given by hand were made"
    )
    with pytest.raises(ConfigError, match="--archive organs= and lesions= are one archive; give it one name"):
        run(tmp_path / "twice", archives={"organs": Path("ct"), "lesions": Path("ct")})


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"sources": {"PT": {"archives": {"organs": ["PT"]}}}},
            "'organs' has no training scan of PT; it has CT",
        ),
        (
            {"targets": {"t": {"archive": "organs", "modalities": ["MR"]}}},
            "cases of CT; modalities asks for MR",
        ),
        ({"budgets": [1, 9]}, "targets.organs: .*budget 9"),
        ({"budgets": [1, "10%"]}, r"targets.organs: budgets are not ascending .* 1 = 1, 10% = 1"),
        ({"labels": {"classes": 9}}, "targets.organs: labels.classes is 9, of 2 foreground classes"),
        ({"stratify": {"by": "source"}}, "targets.organs: no labeled scan states its source"),
    ],
)
def test_what_the_archives_do_not_hold_is_named(tmp_path, changes, message):
    tree = {"archives": ["organs"], "targets": {"organs": {"archive": "organs"}}, **changes}
    tree.setdefault("sources", {"CT": {"archives": {"organs": ["CT"]}}})
    with pytest.raises(ConfigError, match=message):
        run(tmp_path / "out", config=fakes.config(**tree), archives={"organs": Path("ct")})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": {"X": {"archives": {"organs": ["XR"]}}}}, "'CT', 'MR' or 'PT'"),
        ({"sources": {"X": {"archives": {"livers": []}}}}, "names no archive: 'livers'; known: organs, lesions"),
        ({"targets": {"t": {"archive": "livers"}}}, "targets.t names no archive: 'livers'"),
        ({"archives": ["organs", "lesions", "spare"]}, "no source and no target uses archive 'spare'"),
        ({"sources": {"a/b": "encoder"}}, "plain name"),
        ({"sources": {"scratch": "encoder"}}, "name of a baseline"),
        ({"baselines": ["scratch", "scratch"]}, "a baseline stands twice in scratch, scratch; give them names"),
        ({"baselines": [{"baseline": "size_only"}]}, "needs scratch or scratch_long, which gains are measured against"),
        ({"baselines": ["scratch", "encoder"]}, "baselines.encoder is pretrained; name it under sources"),
        ({"baselines": {"scratch": "scratch", "a/b": {"baseline": "atlas"}}}, "baselines.a/b must be a plain name"),
        ({"baselines": ["scratch", {"baseline": "size_onli"}]}, "no baseline named 'size_onli'"),
        ({"targets": {"t": {"archive": "organs", "baselines": ["scratch"]}}}, "baselines.scratch has the name of a"),
        ({"sources": {"a": "encoder"}, "unions": "none", "pretrainings": 2}, "repeats the sources that are pretrained"),
        ({"sources": {"X": {"archives": {"organs": []}, "pretrain": {"train": {"steps": 9}}}}}, "would make"),
        ({"pretrain": {}}, "pretrain is missing"),
        ({"pretrain": {**fakes.TREE["pretrain"], "data": {"batch_size": 2, "modalities": ["CT"]}}}, "set by the bench"),
        ({"pretrain": {**fakes.TREE["pretrain"], "optim": {"lrr": 1}}}, "unknown key 'pretrain.optim.lrr'"),
        ({"pretrain": {**fakes.TREE["pretrain"], "encoder": {"name": "resenc", "size": "s"}}}, "would not fit"),
        ({"subset": "development", "pretrain": {**fakes.TREE["pretrain"], "data": {
            "batch_size": 2, "splits": ["train", "development"]}}}, "which is scored"),
        ({"targets": {"t": {"archive": "organs", "finetune": {"train": {"stepz": 1}}}}}, "did you mean 'steps'"),
        ({"targets": {"t": {"archive": "organs", "budgets": [2, 1]}}}, "ascending"),
        ({"budgets": ["0%"]}, "'0%' is no budget"),
        ({"labels": {}}, "labels needs classes, slices or both"),
        ({"stratify": {"by": "size"}}, "stratify.by"),
        ({"folds": 3}, "unknown key 'folds'"),
    ],
)  # fmt: skip
def test_wrong_configs_are_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        fakes.config(**changes)


def test_lists_of_modalities_go_with_the_archives(tmp_path):
    pretrain = importlib.import_module(locate("pretrain.training_data"))
    path = write_archive(tmp_path / "archive", labels=False).path
    both = pretrain.PretrainData(batch_size=1, modalities=["CT", "MR"])
    assert both.modalities == (("CT", "MR"),)
    assert pretrain.open_archives(both, [path]).members[0].path == path
    one = pretrain.open_archives(pretrain.PretrainData(batch_size=1, modalities=["MR"]), [path])
    assert {row.modality for row in one.scans.values()} == {"MR"}
    with pytest.raises(ConfigError, match="2 lists for 1 archive"):
        pretrain.open_archives(pretrain.PretrainData(batch_size=1, modalities=[["CT"], ["MR"]]), [path])


def test_unions_join_archives_and_modalities():
    sources = {
        "A": {"archives": {"organs": ["CT"]}},
        "B": {"archives": {"organs": ["MR"]}},
        "C": {"archives": {"lesions": []}},
    }
    config = fakes.config(sources=sources)
    assert list(config.sources) == ["A", "B", "C", "A+B", "A+C", "B+C", "A+B+C"]
    assert config.own_sources()["A+B+C"].archives == {"organs": ("CT", "MR"), "lesions": ()}
    assert config.unions == "none"
    assert plans.resolve(config) == config


def test_usage_errors():
    with pytest.raises(ConfigError, match="needs CONFIG, OUT and --archive NAME=PATH"):
        command.main(["out"])
    with pytest.raises(ConfigError, match="write NAME=PATH"):
        command.main(["phantom", "out", "--archive", "archive"])
    with pytest.raises(ConfigError, match="is given twice"):
        command.main(["phantom", "out", "--archive", "a=x", "--archive", "a=y"])
    with pytest.raises(UserError, match="holds no transfer benchmark"):
        command.main(["out", "--report-only"])


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "transfer").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_configs_parse_and_round_trip(path):
    config = command.read_config(path, [])
    assert parse(MatrixConfig, yaml.safe_load(to_yaml(config))) == config
    assert plans.resolve(config) == config


# -- real networks ---------------------------------------------------------------------------------------------------


def real_benchmark(tmp_path, **of_archive):
    """Words that start a transfer of two steps a network, into the folder that they name second."""
    network = {"name": "resenc", "size": "tiny", "features": [4, 8, 8, 8]}
    steps = {"steps": "2 steps", "accelerator": "cpu", "preview_every": None}
    tree = {
        "task": "balls",
        "archives": ["balls"],
        "sources": {"CT": {"archives": {"balls": ["CT"]}}, "MR": {"archives": {"balls": ["MR"]}}},
        "unions": "all",
        "pretrain": {
            "base": "mae",
            "encoder": network,
            "objective": {"size": [16, 16, 16]},
            "data": {"batch_size": 2},
            "train": steps,
        },
        "finetune": {
            "base": "segmentation",
            "encoder": network,
            "objective": {"size": [16, 16, 16]},
            "train": steps,
        },
        "targets": {"CT": {"archive": "balls", "modalities": ["CT"]}},
        "baselines": ["scratch"],
        "budgets": [1, 2],
        "draws": 2,
        "similarity": True,
        "wandb": {"mode": "disabled"},
    }
    write_archive(tmp_path / "archive", **of_archive)
    (tmp_path / "balls.yaml").write_text(yaml.safe_dump(tree))
    words = [
        str(tmp_path / "balls.yaml"),
        str(tmp_path / "out"),
        "--archive",
        f"balls={tmp_path / 'archive'}",
    ]
    return [*words, "--workers", "1", "--quiet"]


@pytest.mark.slow
def test_the_whole_benchmark_with_real_networks(tmp_path):
    words, out = real_benchmark(tmp_path), tmp_path / "out"
    command.main(words)
    assert len(rows_of(out / "matrix.csv")) == 3 * 1 * 2 * 6
    told = json.loads((out / "targets" / "CT" / "summary.json").read_text())["conditions"]
    assert "CT+MR: mae, 2 steps on this archive." in told
    assert "MR: mae, 2 steps on MR of this archive." in told
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary["estimates"]["values"]["CT"]) == {"CT", "MR", "CT+MR", "random weights"}
    sources = {s["name"]: s["modalities"] for s in summary["sources"]}
    assert sources == {"CT": ["CT"], "MR": ["MR"], "CT+MR": ["CT", "MR"]}
    alike = {
        (r["first"], r["first_state"], r["second"], r["second_state"])
        for r in rows_of(out / "similarity.csv")
    }
    assert ("CT", "pretrained", "CT", "fine-tuned") in alike
    assert ("scratch", "fine-tuned", "CT", "fine-tuned") in alike
    kept = {p.parent.parent.name + p.parent.name for p in out.rglob("segmenter.safetensors")}
    assert kept == {"b2d0"}
    assert not list(out.rglob("fits/**/last.ckpt"))
    assert str(tmp_path) not in (out / "report.html").read_text()
    before = {p: p.stat().st_mtime_ns for p in out.rglob("fits/**/cases.csv")}
    written = {name: (out / name).read_bytes() for name in TABLES}
    (out / "targets" / "CT" / "fits" / "MR" / "b2" / "d1" / "cases.csv").unlink()
    (out / "features" / "CT" / "similarity.csv").unlink()
    command.main(words)
    assert {name: (out / name).read_bytes() for name in TABLES} == written, "a fit done again is the same fit"
    assert sum(p.stat().st_mtime_ns != when for p, when in before.items()) == 1


@pytest.mark.slow
def test_scored_labels_reach_neither_budgets_nor_weights_nor_estimates(tmp_path):
    """Other labels of test subjects: other scores, and the same budgets, weights and transferability estimates."""
    outs = [tmp_path / name / "out" for name in ("as_drawn", "turned")]
    for out, turned in zip(outs, ((), TEST), strict=True):
        out.parent.mkdir()
        command.main(real_benchmark(out.parent, turned=turned))
    scores = [[row["dice"] for row in rows_of(out / "cases.csv")] for out in outs]
    assert scores[0] != scores[1]
    first, second = (
        json.loads((out / "targets" / "CT" / "budgets.json").read_text())["cases"] for out in outs
    )
    assert first == second
    first, second = (json.loads((out / "summary.json").read_text())["estimates"]["values"] for out in outs)
    assert first == second
    weights = [sorted(path.relative_to(out) for path in out.rglob("*.safetensors")) for out in outs]
    assert weights[0] == weights[1]
    assert {path.name for path in weights[0]} == {"encoder.safetensors", "segmenter.safetensors"}
    for path in weights[0]:
        one, other = (load_file(out / path) for out in outs)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one), path


@pytest.mark.slow
def test_a_cluster_gives_the_tables_of_real_networks(tmp_path):
    """Pretrainings, fits and frozen features in two workers of Ray, at as many threads each as on one machine."""
    pytest.importorskip("ray", reason="the extra 'cluster' (ray) is not installed")
    config, _, *words = real_benchmark(tmp_path)
    script = "import sys; from finetune.transfer import main; main(sys.argv[1:])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for engine in ("local", "ray"):
        given = [config, str(tmp_path / engine), *words, "--engine", engine, "--workers", "2"]
        subprocess.run(
            [sys.executable, "-c", script, *given], env=environment, cwd=ROOT, check=True, timeout=900
        )
    assert not (tmp_path / "out").exists()
    for name in TABLES:
        assert (tmp_path / "ray" / name).read_bytes() == (tmp_path / "local" / name).read_bytes(), name


@pytest.mark.slow
def test_cases_of_two_channels_are_the_same_prepared_or_joined(tmp_path):
    """An adapted stem, every subset of the channels, several pretrainings, and a baseline beside."""
    steps = {"steps": "2 steps", "accelerator": "cpu", "preview_every": None}
    shared = {"encoder": {"name": "resenc", "size": "tiny", "features": [4, 8, 8, 8]}, "train": steps}
    tree = {
        "task": "balls",
        "archives": ["balls"],
        "sources": {"CT": {"archives": {"balls": ["CT"]}}, "MR": {"archives": {"balls": ["MR"]}}},
        "pretrainings": 2,
        "pretrain": {"base": "mae", **shared, "objective": {"size": [16, 16, 16]}, "data": {"batch_size": 2}},
        "finetune": {
            "base": "segmentation",
            **shared,
            "objective": {"size": [16, 16, 16], "mirror_axes": [2]},
        },
        "targets": {"both": {"archive": "balls", "modalities": ["CT", "MR"]}},
        "baselines": ["scratch", {"baseline": "size_only"}],
        "budgets": [1],
        "draws": 2,
        "missing_modalities": True,
        "similarity": True,
        "wandb": {"mode": "disabled"},
        "metrics": {"flips": True},
    }
    write_archive(tmp_path / "single")
    write_archive(tmp_path / "both", channels=("CT", "MR"))
    (tmp_path / "both.yaml").write_text(yaml.safe_dump(tree))
    for name, out in (("both", "two"), ("single", "joined")):
        words = [str(tmp_path / "both.yaml"), str(tmp_path / out), "--archive", f"balls={tmp_path / name}"]
        command.main([*words, "--workers", "1", "--quiet"])
    for name in ("cases.csv", "curve.csv", "missing.csv", "similarity.csv"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "joined" / name).read_bytes(), name
    fits = tmp_path / "joined" / "targets" / "both" / "fits"
    assert {p.parent.name for p in fits.glob("CT/b1/*/cases.csv")} == {"d0", "d0p1", "d1", "d1p1"}
    assert (
        "stem_block.conv.weight from 1 to 2 channels"
        in (fits / "MR" / "b1" / "d1p1" / "audit.txt").read_text()
    )
    missing = rows_of(tmp_path / "two" / "missing.csv")
    assert {row["given"] for row in missing} == {"CT", "MR", "CT+MR"}
    assert {row["init"] for row in missing} == {"scratch", "CT", "MR"}
    whole = {r["init"]: r["mean"] for r in missing if (r["given"], r["metric"]) == ("CT+MR", "dice")}
    curve = {r["init"]: r["mean"] for r in rows_of(tmp_path / "two" / "curve.csv") if r["metric"] == "dice"}
    assert set(curve) - set(whole) == {"size_only"}
    assert whole == {init: curve[init] for init in whole}, (
        "with every channel the table repeats the comparison"
    )
    cells = json.loads((tmp_path / "two" / "summary.json").read_text())["cells"]
    assert {cell["kind"] for cell in cells} == {"some of the modalities"}
