"""Comparisons: same subsets for every init, restarts that change nothing, honest failures, configs that parse."""

import csv
import dataclasses
import importlib
import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from finetune import compare as command
from finetune import crew as crew_module
from finetune import fits, labeling, mirror, notes, planning, scratch
from finetune import resolving as plans
from finetune.report import main as report_main
from medseg_ssl.cli import locate
from medseg_ssl.config import ConfigError, UserError, override, parse, to_yaml
from medseg_ssl.data.archive import Archive
from medseg_ssl.data.manifest import Split
from medseg_ssl.data.protected import Protected
from medseg_ssl.train.interrupt import Interrupted
from medseg_ssl.train.recorder import Recorder
from medseg_ssl.train.run_folder import RunFolder, hash_file
from medseg_ssl.train.settings import WandbConfig
from tests.data.heads import head, seen
from tests.train.archives import write_archive

from . import fake_comparison as fakes

ROOT = Path(__file__).parents[2]
PRETRAINING = {
    "encoder": {"name": "resenc", "size": "tiny"},
    "objective": {"name": "mae"},
    "data": {"batch_size": 2},
    "train": {"steps": "4 steps"},
}
TABLES = ("cases.csv", "curve.csv", "summary.json", "curve.png", "report.html")


@pytest.fixture(autouse=True)
def _fakes(monkeypatch):
    fakes.use_fakes(monkeypatch.setattr)


def run(out, *, fit=fakes.fake_fit, workers=1, config=None, **options):
    return command.compare(
        config or fakes.config(),
        out,
        archive=Path("archive"),
        workers=workers,
        quiet=True,
        fit=fit,
        pretrain=fakes.fake_pretrain,
        **options,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A comparison that ran through without interruption."""
    with pytest.MonkeyPatch.context() as patch:
        fakes.use_fakes(patch.setattr)
        out = tmp_path_factory.mktemp("finished") / "out"
        run(out)
    return out


def test_tables_of_a_whole_comparison(finished):
    with (finished / "cases.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 3 * 3 * 5 * 2
    assert {row["source"] for row in rows} == {"", "MR"}
    assert {row["init"] for row in rows if row["source"]} == {"mae"}
    assert {row["nsd"] for row in rows} == {""}
    summary = json.loads((finished / "summary.json").read_text())
    assert (summary["finished"], summary["planned"]) == (27, 27)
    assert summary["baselines"] == ["scratch", "scratch_long"]
    assert "mae beats scratch and scratch_long at 1, 2 and 4 labels" in summary["verdicts"][0]
    assert summary["inits"]["mae"]["savings"][0]["savings"] == pytest.approx(1.74, abs=0.4)
    assert b"'scratch_long'" in (finished / "curve.png").read_bytes(), "drawn of these inits"


def test_one_fit_per_cell_with_equal_subsets_and_seeds_for_every_init(finished):
    config = fakes.config()
    subsets = labeling.training_subsets(config, fakes.archive())
    tasks = tasks_of(config)
    # draw by draw, so that a comparison stopped early has every budget
    assert [(t.draw, t.budget) for t in tasks] == sorted((t.draw, t.budget) for t in tasks)
    assert [t.init for t in tasks[:3]] == ["scratch", "scratch_long", "mae"]
    by_cell = {}
    for task in tasks:
        by_cell.setdefault((task.budget, task.draw), set()).add(
            (task.seed, task.train_cases, task.test_cases)
        )
    assert all(len(found) == 1 for found in by_cell.values())
    assert len({task.seed for task in tasks}) == len(by_cell)
    for draw in subsets:
        assert subsets[draw][1] == subsets[draw][4][:1]
        assert subsets[draw][2] == subsets[draw][4][:2]
    assert len({tuple(subsets[d][4]) for d in subsets}) == 3
    assert {t.init: t.steps for t in tasks} == {"scratch": 20, "scratch_long": 120, "mae": 20}
    assert {t.config["wandb"]["mode"] for t in tasks} == {"disabled"}


def tasks_of(config, archive=None, **changes):
    archive = archive or fakes.archive()
    settings = {
        "archives": (Path("a"), Path("a")),
        "folds": labeling.folds_of(config, archive, archive),
        "encoders": {planning.EncoderKey("mae"): Path("e")},
        "sources": {"mae": "MR"},
        "target": "MR",
        "pretraining_steps": 100,
        "network": None,
        "keep": False,
    }
    return planning.fit_tasks(config, Path("out"), **{**settings, **changes})


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_killed_and_continued_gives_the_uninterrupted_tables(tmp_path, finished, number):
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.commands.fake_comparison", str(out)],
        cwd=ROOT,
        start_new_session=True,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while len(list(out.glob("fits/*/*/*/cases.csv"))) < 4:
        assert process.poll() is None, "the comparison ended before it could be interrupted"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    process.wait(timeout=30)
    assert process.returncode != 0
    done = {p: p.stat().st_mtime_ns for p in out.glob("fits/*/*/*/cases.csv")}
    assert 4 <= len(done) < 27
    run(out)
    assert all(path.stat().st_mtime_ns == when for path, when in done.items()), "finished fits were repeated"
    for name in TABLES:
        assert (out / name).read_bytes() == (finished / name).read_bytes(), name


def test_side_by_side_in_lasting_workers_gives_the_same_tables(tmp_path, finished):
    run(tmp_path / "out", fit=fakes.counting_fit, workers=2)
    workers = {p.name.rsplit("-", 1)[-1] for p in (tmp_path / "out").glob("did-*")}
    assert len(list((tmp_path / "out").glob("did-*"))) == 27
    assert len(workers) <= 2
    for name in TABLES:
        assert (tmp_path / "out" / name).read_bytes() == (finished / name).read_bytes(), name


def test_a_failed_fit_leaves_the_others_in_the_tables_and_is_tried_again(tmp_path, finished):
    out = tmp_path / "out"
    with pytest.raises(
        UserError, match=r"1 fits failed, the first is mae, 2 labels, draw 1: loss is not finite"
    ):
        run(out, fit=fakes.failing_fit)
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["finished"], summary["planned"]) == (26, 27)
    assert "Unfinished: 26 of 27" in (out / "report.html").read_text()
    gap = (
        "1 of 27 fits failed and are missing: mae with 2 labels, draw 1. The means of an init are over the draws that"
        " it has, paired comparisons over those that both have."
    )
    assert summary["conditions"][-1] == gap
    whole = json.loads((finished / "summary.json").read_text())

    def compared(summary, init, baseline, scope):
        (found,) = (
            c
            for c in summary["comparisons"]
            if (c["init"], c["baseline"], c["scope"]) == (init, baseline, scope)
        )
        return found

    # the gap is the init's own: what the others found stands
    assert {**summary["inits"]["scratch"]} == {**whole["inits"]["scratch"]}
    assert compared(summary, "mae", "scratch", "budget 2")["draws"] == 2
    assert compared(summary, "mae", "scratch", "budget 4") == {
        **compared(whole, "mae", "scratch", "budget 4"),
        **{k: v for k, v in compared(summary, "mae", "scratch", "budget 4").items() if k.endswith("_holm")},
    }
    run(out)
    assert (out / "curve.csv").read_bytes() == (finished / "curve.csv").read_bytes()
    assert gap not in json.loads((out / "summary.json").read_text())["conditions"]


def test_ctrl_c_and_sigterm_say_what_was_reached(tmp_path):
    def stop(task):
        if task.draw == 1:
            raise KeyboardInterrupt
        return fakes.fake_fit(task)

    with pytest.raises(
        Interrupted, match=r"stopped by SIGINT: 9 of 27 fits are done; run the same"
    ) as caught:
        run(tmp_path / "out", fit=stop)
    assert caught.value.code == 130


def test_a_config_wrong_for_every_fit_is_a_config_error(tmp_path):
    def fail(task):
        raise ConfigError("crop size [7, 7, 7] does not fit")

    with pytest.raises(ConfigError, match=r"^crop size \[7, 7, 7\] does not fit$"):
        run(tmp_path / "out", fit=fail)


def test_going_on_keeps_the_threads_of_every_worker():
    crew = crew_module.Crew(workers=2, engine="local", gpus=(), quiet=True)
    crew.cores = 2
    given = []

    def fake_map(function, tasks, **options):
        given.append((len(tasks), options["workers"], options["threads"]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crew_module, "map_tasks", fake_map)
        config = fakes.config()
        tasks = tasks_of(config)
        crew.fit(fakes.fake_fit, tasks, done=0)
        crew.fit(fakes.fake_fit, tasks[-1:], done=len(tasks) - 1)
    assert given == [(27, 2, 1), (1, 2, 1)]


def test_every_fit_failing_stops_early(tmp_path):
    tried = []

    def fail(task):
        tried.append(task)
        raise UserError("no space left")

    with pytest.raises(UserError, match=r"3 fits failed.*no space left"):
        run(tmp_path / "out", fit=fail)
    assert len(tried) == 3


def test_another_config_or_archive_is_refused_with_the_difference(tmp_path, monkeypatch):
    out = tmp_path / "out"
    run(out)
    with pytest.raises(ConfigError, match=r"draws: 3 -> 4"):
        run(out, config=fakes.config(draws=4))
    monkeypatch.setattr(Archive, "open", _other_archive)
    with pytest.raises(ConfigError, match="archive"):
        run(out)


def test_an_interrupted_comparison_keeps_its_config(tmp_path):
    def stop(task):
        if task.budget == 2:
            raise KeyboardInterrupt
        return fakes.fake_fit(task)

    with pytest.raises(Interrupted):
        run(tmp_path / "out", fit=stop)
    # finished fits of seed 0 would pass for fits of seed 1
    with pytest.raises(ConfigError, match="seed: 0 -> 1"):
        run(tmp_path / "out", config=fakes.config(seed=1))


def _other_archive(path):
    other = fakes.archive()
    other.fingerprint = "0" * 16
    return other


@pytest.fixture
def sends(monkeypatch):
    """Ids under which comparisons are sent, in place of sending them."""
    monkeypatch.delenv("WANDB_MODE")
    asked = []
    monkeypatch.setattr(mirror, "send_comparison", lambda *a, known_id, **more: asked.append(known_id))
    return asked


def test_a_comparison_killed_before_the_mirror_got_it_is_sent_once(tmp_path, monkeypatch, sends):
    def killed(*args, known_id, **more):
        sends.append(known_id)
        raise KeyboardInterrupt

    config = fakes.config(wandb={"mode": "offline"}, budgets=[1], draws=1, inits={"scratch": "scratch"})
    out, other = tmp_path / "out", tmp_path / "other"
    with monkeypatch.context() as patch:
        patch.setattr(mirror, "send_comparison", killed)
        with pytest.raises(KeyboardInterrupt):
            run(out, config=config)
    assert (out / "report.html").is_file()
    half = out / "wandb" / f"offline-run-20250101_000000-{sends[0]}"
    half.mkdir(parents=True)
    shutil.copytree(out, other)
    for _ in range(2):
        run(out, config=config)
    assert sends == [sends[0]] * 2, "again once, as the same run"
    assert not half.exists()
    command.main([str(other), "--report-only", "--quiet"])
    assert sends == [sends[0]] * 3
    assert json.loads((other / "mirror.json").read_text())["sent"]


def test_only_what_is_whole_and_unsent_is_sent_late(tmp_path, monkeypatch, sends, caplog):
    given, wrong = tmp_path / "given.safetensors", tmp_path / "wrong.safetensors"
    given.write_bytes(b"weights")
    wrong.write_bytes(b"other weights")
    (tmp_path / "config.yaml").write_text("task: fake\nwandb: {mode: offline}\n")
    inputs = {"encoders": {"given": hash_file(given)}}
    (tmp_path / "inputs.json").write_text(json.dumps(inputs))
    part, whole = SimpleNamespace(finished=1, planned=2), SimpleNamespace(finished=2, planned=2)
    mirror.send_left(tmp_path, part, encoders={"given": given})
    mirror.send_left(tmp_path, whole, encoders={})
    assert "add --encoder given=FILE" in caplog.text
    with pytest.raises(ConfigError, match=r"--encoder given=wrong.safetensors is no file that"):
        mirror.send_left(tmp_path, whole, encoders={"given": wrong})
    with RunFolder(tmp_path / "busy", config=fakes.config(), inputs=inputs, ships="none"):
        shutil.copy(tmp_path / "config.yaml", tmp_path / "busy")
        mirror.send_left(tmp_path / "busy", whole, encoders={"given": given})
    monkeypatch.setenv("WANDB_MODE", "disabled")
    mirror.send_left(tmp_path, whole, encoders={"given": given})
    monkeypatch.delenv("WANDB_MODE")
    assert sends == []
    for _ in range(2):
        mirror.send_left(tmp_path, whole, encoders={"given": given})
    assert len(sends) == 1
    # an earlier version left its run and no mark
    (tmp_path / "mirror.json").unlink()
    (tmp_path / "wandb" / "offline-run-20250101_000000-abcd1234").mkdir(parents=True)
    mirror.send_left(tmp_path, whole, encoders={"given": given})
    assert len(sends) == 1


def test_report_only_writes_what_is_done(tmp_path, finished):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="holds no comparison"):
        command.main([str(out), "--report-only"])
    with pytest.raises(UserError):
        run(out, fit=fakes.failing_fit)
    (out / "report.html").unlink()
    assert command.main([str(out), "--report-only", "--quiet"]) == out / "report.html"
    assert "26 of 27" in (out / "report.html").read_text()
    assert draws_of(out) == {(i, b): 2 if (i, b) == ("mae", "2") else 3 for i, b in draws_of(out)}


def draws_of(out):
    with open(out / "curve.csv", encoding="utf-8") as stream:
        rows = [row for row in csv.DictReader(stream) if row["metric"] == "dice"]
    return {(row["init"], row["budget"]): int(row["draws"]) for row in rows}


def test_a_draw_that_one_init_still_lacks_counts_for_none(tmp_path):
    """Or the means would be over different draws."""

    def stop(task):
        if (task.init, task.budget, task.draw) == ("mae", 2, 2):
            raise KeyboardInterrupt
        return fakes.fake_fit(task)

    with pytest.raises(Interrupted):
        run(tmp_path / "out", fit=stop)
    command.main([str(tmp_path / "out"), "--report-only", "--quiet"])
    inits = ("scratch", "scratch_long", "mae")
    expected = {(init, str(budget)): 3 if budget == 1 else 2 for init in inits for budget in (1, 2, 4)}
    assert draws_of(tmp_path / "out") == expected


def test_report_verb_takes_comparisons_and_runs(tmp_path, finished):
    single = tmp_path / "run"
    single.mkdir()
    (single / "config.yaml").write_text("objective: {name: mae}\n")
    (single / "metrics.jsonl").write_text('{"step": 1, "train/loss": 2.0, "train/x": null}\n{"step": 2, "tra')
    page = report_main([str(finished), str(single), "--out", str(tmp_path / "all.html")]).read_text()
    assert "mae beats scratch" in page
    assert "run · pretraining with mae" in page
    with pytest.raises(ConfigError, match="is a folder; --out names a file"):
        report_main([str(single), "--out", str(tmp_path), "--overwrite"])
    with pytest.raises(ConfigError, match=r"all.html exists"):
        report_main([str(single), "--out", str(tmp_path / "all.html")])
    assert (tmp_path / "all.html").read_text() == page
    report_main([str(single), "--out", str(tmp_path / "all.html"), "--overwrite"])
    assert (tmp_path / "all.html").read_text() != page
    with pytest.raises(ConfigError, match="no such run folder"):
        report_main([str(tmp_path / "nothing"), "--out", str(tmp_path / "x.html")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="is no run folder"):
        report_main([str(tmp_path / "empty"), "--out", str(tmp_path / "x.html")])


# -- configs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "compare").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_configs_parse_and_round_trip(path):
    import yaml

    config = command.read_config(path, [])
    assert parse(plans.CompareConfig, yaml.safe_load(to_yaml(config))) == config
    assert plans.resolve(config) == config
    assert "scratch" in config.baselines()


@pytest.fixture
def config_file(tmp_path):
    """Like a shipped config, but not tuned by anybody."""
    (tmp_path / "compare.yaml").write_text(CONFIG, encoding="utf-8")
    return tmp_path / "compare.yaml"


CONFIG = """
task: t
budgets: [1, 2]
draws: {1: 3, 2: 3}
inits:
  scratch: scratch
  mae: {pretrain: {base: mae, encoder: {name: resenc, size: tiny}}}
finetune:
  base: segmentation
  encoder: {name: resenc, size: tiny}
"""


def test_overrides_reach_into_shipped_configs(config_file):
    path = config_file
    config = command.read_config(
        path, ["inits.mae.pretrain.train.steps=7", "draws.1=2", "finetune.optim.lr=3e-4"]
    )
    assert config.inits["mae"]["pretrain"]["train"]["steps"] == "7 steps"
    assert config.draws_of("mae", 1) == 2
    assert config.finetune["optim"]["lr"] == pytest.approx(3e-4)
    by_name = plans.expand(override({"inits": {}}, ["inits.x.pretrain=mae"]))
    assert by_name["inits"]["x"]["pretrain"]["objective"]["name"] == "mae"


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        (
            "inits.mae.pretrain.optim.lrr=1",
            r"unknown key 'inits.mae.pretrain.optim.lrr' \(did you mean 'lr'\?\)",
        ),
        ("finetune.objective.loss=dice", "objective.loss"),
        ("inits.mae.pretrain.data.splits=[train, development]", None),
        ("inits.mae.pretrain.encoder.size=s", "encoder.* differ"),
        ("finetune.train.steps=3 epochs", "must be a number of steps"),
        ("budgets=[4, 2]", "ascending"),
        ("init_overrides.mea.optim.lr=1", "names no init: 'mea'"),
        ("init_overrides.mae.train.steps=9", "would make the comparison unequal"),
        ("inits.x=stratch", "is none of scratch"),
        ("inits.a/b=scratch", "plain name"),
        ("budgets=[1, 3]", "draws says nothing about budget 3"),
    ],
)
def test_wrong_configs_are_named(config_file, assignment, message):
    if message is None:
        command.read_config(
            config_file, [assignment]
        )  # development may be pretrained on where test is scored
        with pytest.raises(ConfigError, match="which is scored"):
            command.read_config(config_file, [assignment, "subset=development"])
        return
    with pytest.raises(ConfigError, match=message):
        command.read_config(config_file, [assignment])


def test_overrides_of_an_init_reach_its_fits_alone_and_the_report():
    config = fakes.config(init_overrides={"mae": {"optim": {"lr": 0.5}}})
    tasks = tasks_of(config)
    rates = {task.init: task.config.get("optim", {}).get("lr") for task in tasks}
    assert rates == {"scratch": None, "scratch_long": None, "mae": 0.5}
    folds = labeling.folds_of(config, fakes.archive(), fakes.archive())
    said = notes.notes_of(
        config, tasks, folds=folds, cards={"mae": fakes.card(Path())}, archive=fakes.archive()
    )
    assert not any("no labeled case states" in note for note in said)
    partial = fakes.archive()
    for name in ("c0", "c1", "c2"):
        partial.cases[name].known_classes = (True, *[False] * (len(partial.classes) - 1))
    for task in tasks:
        object.__setattr__(task, "train_cases", ("c0", "c1")[: task.budget] if task.draw else ("c3",))
    told = notes.notes_of(config, tasks, folds=folds, cards={}, archive=partial)
    unstated = ", ".join(partial.classes[1:])
    assert f"1 label, draw 1: no labeled case states {unstated}, so no init can predict it there." in told
    assert not any("draw 0: no labeled" in note for note in told)
    assert "mae differs from the others in: optim.lr=0.5." in said


GENTLE = {
    "tune": {"name": "lora", "rank": 4},
    "optim": {"lr": 0.02, "encoder_lr_scale": 0.3, "decoder_first": "10%", "sawtooth": True},
}


def test_what_starts_from_nothing_is_not_held_back_by_what_spares_pretrained_weights():
    inits = {**fakes.config().inits, "other": {"network": {"encoder": {"name": "resenc", "size": "tiny"}}}}
    own = {"scratch_long": {"tune": {"name": "frozen"}, "optim": {"layer_decay": 0.75}}}
    config = fakes.config(inits=inits, finetune={**fakes.config().finetune, **GENTLE}, init_overrides=own)
    tasks = tasks_of(config)
    trees = {task.init: task.config for task in tasks}
    free = {"lr": 0.02, "encoder_lr_scale": 1.0, "decoder_first": "0%", "sawtooth": False}
    for init in ("scratch", "other"):
        assert (trees[init]["tune"], trees[init]["optim"]) == ({"name": "full"}, free)
    assert {key: trees["mae"][key] for key in GENTLE} == GENTLE
    # a control of random weights may be asked for, and the report states it
    assert trees["scratch_long"]["tune"] == {"name": "frozen"}
    assert trees["scratch_long"]["optim"] == {**free, "layer_decay": 0.75}
    folds = labeling.folds_of(config, fakes.archive(), fakes.archive())
    said = notes.notes_of(config, tasks, folds=folds, cards={}, archive=fakes.archive())
    assert (
        "scratch, other: nothing of it is pretrained, so it is trained whole, at the full rate from the"
        " first step; tune.name=lora, optim.encoder_lr_scale=0.3, optim.decoder_first=10%, optim.sawtooth=True holds"
        " for what is pretrained alone."
    ) in said
    assert "scratch_long differs from the others in: tune.name=frozen, optim.layer_decay=0.75." in said


def test_a_comparison_begun_with_scratch_held_back_is_not_gone_on_with(tmp_path):
    config = fakes.config(finetune={**fakes.config().finetune, **GENTLE}, budgets=[1], draws=1)
    run(tmp_path, config=config)
    inputs = json.loads((tmp_path / "inputs.json").read_text())
    (tmp_path / "inputs.json").write_text(
        json.dumps({k: v for k, v in inputs.items() if k != "from_scratch"})
    )
    with pytest.raises(ConfigError, match='from_scratch: null -> "whole, at the full rate"'):
        run(tmp_path, config=config)


def test_what_starts_from_nothing_is_as_it_was_where_nothing_is_spared(tmp_path):
    """So fits of before are digit for digit those of now."""
    config = fakes.config()
    assert all("optim" not in task.config and "tune" not in task.config for task in tasks_of(config))
    run(tmp_path, config=fakes.config(budgets=[1], draws=1))
    assert "from_scratch" not in json.loads((tmp_path / "inputs.json").read_text())


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "compare").glob("*.yaml")), ids=lambda p: p.stem)
def test_no_shipped_comparison_spares_weights_in_what_its_inits_share(path):
    """Their measured numbers stand in README."""
    assert scratch.held_back(command.read_config(path, []).finetune) == {}


def test_fewer_draws_for_a_slow_baseline():
    config = fakes.config(init_draws={"scratch_long": 1})
    grid = planning.fit_grid(config)
    assert len([cell for cell in grid if cell[0] == "scratch_long"]) == 3
    assert len(grid) == 21


# -- inputs ----------------------------------------------------------------------------------------------------------


def test_encoder_files_go_with_their_inits(tmp_path):
    file = tmp_path / "e.safetensors"
    file.write_text("weights")
    config = fakes.config(inits={"scratch": "scratch", "given": "encoder"})
    run(tmp_path / "out", config=config, encoders={"given": file})
    with pytest.raises(ConfigError, match="--encoder given=FILE"):
        run(tmp_path / "out2", config=config)
    with pytest.raises(ConfigError, match="--encoder gevin=… is not in the config; known: given"):
        run(tmp_path / "out2", config=config, encoders={"given": file, "gevin": file})
    for name in ("given@p2", "given@p0", "given@f1", "other@p1"):
        with pytest.raises(
            ConfigError, match=f"--encoder {name}=… is no further pretraining .* known: given"
        ):
            run(tmp_path / "out2", config=config, encoders={"given": file, name: file})


def test_further_files_of_an_init_are_its_pretrainings(tmp_path):
    config = fakes.config(inits={"scratch": "scratch", "given": "encoder"}, budgets=[1], draws=2)
    for name in "ab":
        (tmp_path / name).write_text(name)
    files = {"given": tmp_path / "a", "given@p1": tmp_path / "b"}
    started = []
    run(
        tmp_path / "out",
        config=config,
        encoders=files,
        fit=lambda task: started.append(task) or fakes.fake_fit(task),
    )
    found = {(t.init, t.draw, t.pretraining, t.encoder and t.encoder.name) for t in started}
    given = {("given", draw, number, name) for draw in (0, 1) for number, name in enumerate("ab")}
    assert found == given | {("scratch", draw, 0, None) for draw in (0, 1)}
    told = json.loads((tmp_path / "out" / "summary.json").read_text())["conditions"]
    assert "given: pretrained 2 times; every draw is fine-tuned from each." in told
    assert set(json.loads((tmp_path / "out" / "inputs.json").read_text())["encoders"]) == set(files)


def test_encoders_of_different_networks_are_not_compared(tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    network = {"a": {"name": "resenc", "size": "tiny"}, "b": {"name": "resenc", "size": "s"}}
    monkeypatch.setattr(command, "_card", lambda path: {**fakes.card(path), "encoder": network[path.name]})
    config = fakes.config(inits={"scratch": "scratch", "a": "encoder", "b": "encoder"})
    config = config.model_copy(update={"finetune": {**config.finetune, "encoder": None}})
    with pytest.raises(ConfigError, match="encoders of 'a' and 'b' are different networks"):
        run(tmp_path / "out", config=config, encoders={name: tmp_path / name for name in network})


def test_too_large_budget_and_scored_scans_in_training_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="budget 9"):
        run(tmp_path / "out", config=fakes.config(budgets=[1, 9]))
    leaking = fakes.archive(hashes={"s7": "s2"})
    with pytest.raises(
        UserError, match="1 of 5 scored cases hold a scan that also stands on the training side"
    ):
        labeling.scored_cases(fakes.config(), leaking, leaking)
    looking = fakes.archive()
    for key in ("v7", "v3"):
        looking.scans[key].appearance = seen("row", head(0)).appearance
    with pytest.raises(
        UserError, match=r"the first is c7: scan v7 has the look \(similarity 1.000\) of v3\): leave"
    ):
        labeling.scored_cases(fakes.config(), looking, looking)
    with pytest.raises(UserError, match="no labeled case in subset 'development'"):
        labeling.scored_cases(fakes.config(subset="development"), fakes.archive(), fakes.archive())


def test_the_longest_of_several_files_of_an_encoder_is_what_it_cost(tmp_path, monkeypatch):
    for name in "ab":
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(
        command, "_card", lambda p: {**fakes.card(p), "steps": 1000 if p.name == "b" else 100}
    )
    inits = {"scratch": "scratch", "scratch_long": "scratch_long", "given": "encoder"}
    started = []
    run(
        tmp_path / "out",
        config=fakes.config(inits=inits, budgets=[1], draws=1),
        encoders={"given": tmp_path / "a", "given@p1": tmp_path / "b"},
        fit=lambda task: started.append(task) or fakes.fake_fit(task),
    )
    assert {t.init: t.steps for t in started} == {"scratch": 20, "scratch_long": 1020, "given": 20}


def test_labels_of_one_person_are_said_to_be(tmp_path):
    archive = fakes.archive()
    config = fakes.config(budgets=[1, 2], draws=1)
    run(tmp_path / "a", config=config)
    tasks = [SimpleNamespace(budget=b, train_cases=list(archive.cases)[:b]) for b in (1, 2)]
    assert notes._subject_notes(tasks, archive) == []
    first, second, *_ = archive.cases
    twin = SimpleNamespace(cases={**archive.cases, second: archive.cases[first]})
    assert notes._subject_notes(tasks, twin) == [
        "A subject's cases are labeled together: 1 label of 1 subject, 2 labels of 1 subject."
    ]
    told = json.loads((tmp_path / "a" / "summary.json").read_text())["conditions"]
    assert not any("labeled together" in line for line in told)


def test_what_a_pretraining_warned_of_is_a_condition_of_its_numbers(tmp_path):
    def collapsing(task):
        made = fakes.fake_pretrain(task)
        with Recorder(made.parent) as recorder:
            recorder.warn("features collapse (rank 1.00)")
        with Recorder(made.parent) as recorder:  # of a run that was broken off and goes on
            recorder.warn("features collapse (rank 1.08)")
        return made

    config = fakes.config(budgets=[1], draws=1)
    command.compare(
        config, tmp_path / "out", archive=Path("archive"), quiet=True, fit=fakes.fake_fit, pretrain=collapsing
    )
    told = json.loads((tmp_path / "out" / "summary.json").read_text())["conditions"]
    assert told[-1] == "Pretraining mae warned: features collapse (rank 1.00)."
    assert sum("warned" in line for line in told) == 1
    assert told[-1] in (tmp_path / "out" / "report.html").read_text()


def test_pretrainings_stand_in_the_mirror_where_their_comparison_does(tmp_path, monkeypatch):
    wandb = WandbConfig(mode="online", project="mine", entity="us")
    (task,) = planning.pretrain_tasks(
        fakes.config(wandb=wandb.model_dump()), tmp_path, archive=Path("archive")
    )
    assert task.wandb == wandb
    archive = write_archive(tmp_path / "archive").path
    opened = []

    class StopError(Exception):
        pass

    def session(**given):
        opened.append(given["wandb"])
        raise StopError

    monkeypatch.undo()
    monkeypatch.setattr(importlib.import_module(locate("pretrain.run")), "Session", session)
    tree = {**PRETRAINING, "objective": {"name": "mae", "size": [16, 16, 16]}}
    own = {"project": "other", "pictures": True}
    for number, words in enumerate((own, {**own, "mode": "disabled"})):
        task = dataclasses.replace(
            task, config={**tree, "wandb": words}, archive=archive, folder=tmp_path / f"{number}/pretrain/mae"
        )
        with pytest.raises(StopError):
            fits.pretrain_init(task)
    assert opened == [
        WandbConfig(mode="online", project="mine", entity="us", pictures=True),
        WandbConfig(mode="disabled", project="other", pictures=True),  # who sends nothing goes on so
    ]


def test_the_command_of_a_report_names_no_path(tmp_path):
    config = tmp_path / "Doe_Jane" / "ft.yaml"
    given = command.parser().parse_intermixed_args(
        ["phantom", str(tmp_path / "out"), "--archive", "a", f"finetune={config}", "task=two words",
         f"inits.x={{pretrain: {config}}}", f"inits.y.pretrain.data.protect=[{tmp_path}]", "keep=knn/dice"]
    )  # fmt: skip
    told = command._command(given, encoders=[])
    assert str(tmp_path) not in told
    assert shlex.split(told)[6:] == [
        *("finetune=ft", "task=two words", "inits.x={pretrain: ft}", "inits.y.pretrain.data.protect=[PATH]"),
        "keep=knn/dice",
    ]


@pytest.mark.slow
def test_pretraining_is_kept_from_a_test_archive_of_its_own(tmp_path, monkeypatch):
    seen_by = []
    located = importlib.import_module(locate("pretrain.run"))  # as an installed package or as a checkout
    monkeypatch.setattr(located, "run_pretrain", lambda config, *_, **__: seen_by.append(config.data.protect))

    def pretrain(task):
        fits.pretrain_init(dataclasses.replace(task, config=PRETRAINING))
        return fakes.fake_pretrain(task)

    for number, options in enumerate(({}, {"test_archive": Path("other")})):
        command.compare(
            fakes.config(),
            tmp_path / str(number),
            archive=Path("archive"),
            quiet=True,
            fit=fakes.fake_fit,
            pretrain=pretrain,
            **options,
        )
    assert seen_by == [(), (Protected(archive=Path("other"), split="default"),)]


def test_a_test_archive_is_protected_by_the_split_and_subset_that_are_scored():
    def protected(test, **changes):
        lists = Split(name="any", seed=0, train=("a",), development=(), test=test)
        scored = SimpleNamespace(split={"default": None, "second": lists}.__getitem__)
        return command._protected(fakes.config(split="second", **changes), Path("other"), scored)

    other = {"archive": Path("other"), "split": "second"}
    assert protected(("b",)) == Protected(**other, sides=("test", "development"))
    assert protected(()) == Protected(**other, sides=("test", "development", "train")), (
        "it is scored as a whole"
    )
    assert protected(("b",), subset="development").sides == ("test", "development", "train")


def test_protect_has_no_place_in_a_comparison():
    tree = {**PRETRAINING, "data": {"batch_size": 2, "protect": ["other"]}}
    config = fakes.config(inits={"scratch": "scratch", "mae": {"pretrain": tree}})
    with pytest.raises(
        ConfigError, match=r"inits\.mae\.pretrain\.data\.protect has no place in a comparison"
    ):
        plans.resolve(config)


def test_scratch_long_without_pretraining_is_refused():
    with pytest.raises(ConfigError, match="no init is pretrained"):
        fakes.config(inits={"scratch": "scratch", "scratch_long": "scratch_long"})


def test_usage_errors():
    with pytest.raises(ConfigError, match="needs CONFIG, OUT and --archive"):
        command.main(["phantom", "out"])
    with pytest.raises(ConfigError, match="write NAME=FILE"):
        command.main(["phantom", "out", "--archive", "a", "--encoder", "x"])
    with pytest.raises(ConfigError, match="at least 1"):
        command.main(["phantom", "out", "--archive", "a", "--workers", "0"])
