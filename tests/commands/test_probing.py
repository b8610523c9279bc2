"""Evaluations within pretraining: how often, on whom, what they choose, and that a broken run chooses the same."""

import json
import time

import pytest
import torch

from finetune.crew import Crew
from finetune.fits import PretrainTask
from medseg_ssl.config import ConfigError, UserError, parse
from medseg_ssl.data.archive import Archive
from medseg_ssl.evaluations.health import Health
from medseg_ssl.inference.frozen import FrozenEncoder
from medseg_ssl.nets import encoder_file
from medseg_ssl.train.runtime import Runtime
from medseg_ssl.train.session import build_evaluations
from medseg_ssl.types import Score
from pretrain.probing import with_interval
from pretrain.run import PretrainConfig, run_pretrain
from tests.train.archives import write_archive

KNN = {
    "crop_size": [16, 16, 16],
    "cases": 1,
    "scored": 1,
    "windows": 1,
    "taught_voxels": 64,
    "scored_voxels": 64,
}


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return write_archive(tmp_path_factory.mktemp("probing") / "archive").path


def config(**changes):
    tree = {
        "encoder": {"name": "resenc", "features": [4, 8, 8, 8]},
        "objective": {"name": "mae", "size": [16, 16, 16]},
        "data": {"batch_size": 2},
        "optim": {"lr": 0.05},
        "train": {
            "steps": 4,
            "save_every": 2,
            "ema": 0.5,
            "evaluate_every": "1 steps",
            "preview_every": None,
            "accelerator": "cpu",
        },
        "wandb": {"mode": "disabled"},
        "evaluations": {"knn": KNN},
        "keep_best": {"score": "knn/dice"},
    }
    return parse(PretrainConfig, {**tree, **changes})


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_best_encoder_ships_and_a_broken_run_ships_the_same(archive, tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    shipped = run_pretrain(config(), whole, archive=archive, quiet=True)
    scores = {row["step"]: row["eval/knn/dice"] for row in metrics(whole) if "eval/knn/dice" in row}
    assert sorted(scores) == [1, 2, 3, 4]
    card = encoder_file.load_card(shipped)
    best = max(scores.values())
    assert card.chosen_by == {
        "score": "knn/dice",
        "mode": "max",
        "value": best,
        "subset": "development",
        "step": min(step for step, value in scores.items() if value == best),
        "of_steps": 4,
        "candidates": 4,
    }
    assert card.steps == card.chosen_by["step"]
    last = encoder_file.load_card(whole / "encoder_last.safetensors")
    assert (last.steps, last.chosen_by) == (4, None)

    # what ships is what was scored: the averaged weights of that step
    (judge,) = build_evaluations({"knn": KNN}).values()
    opened = Archive.open(archive)
    for file, value in ((shipped, best), (whole / "encoder_last.safetensors", scores[4])):
        again = {s.name: s.value for s in judge.run(FrozenEncoder.load(file), opened)}
        assert again["dice"] == value

    seed_step = Runtime.seed_step

    def breaks(self, seed, step):
        if step == 3:
            raise ConnectionError("the power went out")
        seed_step(self, seed, step)

    monkeypatch.setattr(Runtime, "seed_step", breaks)
    with pytest.raises(ConnectionError):
        run_pretrain(config(), tmp_path / "broken", archive=archive, quiet=True)
    assert torch.load(tmp_path / "broken" / "last.ckpt", weights_only=True)["step"] == 2
    monkeypatch.undo()
    continued = run_pretrain(config(), tmp_path / "broken", archive=archive, quiet=True)
    assert continued.read_bytes() == shipped.read_bytes()
    assert (tmp_path / "broken" / "encoder_last.safetensors").read_bytes() == (
        whole / "encoder_last.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"evaluations": {"knn": {**KNN, "subset": "test"}}},
            "subset is 'test', so keep_best would choose by test",
        ),
        (
            {
                "evaluations": {"health": {"subset": "all", "crop_size": [16, 16, 16]}},
                "keep_best": {"score": "health/effective_rank/all"},
            },
            "evaluations.health.subset is 'all'",
        ),
        ({"keep_best": {"score": "linear/dice"}}, "names the evaluation 'linear'; evaluations has knn"),
        ({"evaluations": {}}, "evaluations has none"),
        (
            {"evaluations": {"segmentation": {}}, "keep_best": None},
            "evaluations.segmentation looks at a segmenter",
        ),
    ],
)
def test_who_may_not_choose(archive, tmp_path, changes, told):
    with pytest.raises(ConfigError, match=told):
        run_pretrain(config(**changes), tmp_path / "run", archive=archive, quiet=True)
    assert not (tmp_path / "run").exists()


def test_labels_that_are_not_there_are_missed_before_anything_runs(archive, tmp_path):
    """Some modalities of an archive, or several archives, have none; a whole archive without labels neither."""
    others = "take an evaluation that reads none: feature_pca, geometry, health, leakage, retrieval$"
    some = {"batch_size": 2, "modalities": ["CT"]}
    with pytest.raises(
        ConfigError, match=f"knn reads labels, and scans .* as some modalities of one, .* {others}"
    ):
        run_pretrain(config(data=some), tmp_path / "run", archive=archive, quiet=True)
    bare = write_archive(tmp_path / "bare", labels=False).path
    with pytest.raises(ConfigError, match=f"knn reads labels, and {bare} has none; .* {others}"):
        run_pretrain(config(), tmp_path / "run", archive=bare, quiet=True)
    assert not (tmp_path / "run").exists()

    plain = config(evaluations={}, keep_best=None).model_dump(mode="json")
    probed = config(data=some).model_dump(mode="json")
    tasks = [PretrainTask(tmp_path / name, tree, archive, init=name) for name, tree in
             (("plain", plain), ("probed", probed))]  # fmt: skip
    begun = []
    with pytest.raises(ConfigError, match=r"pretraining probed: evaluations\.knn reads labels"):
        Crew(workers=1, engine="local", gpus=(), quiet=True).pretrain(begun.append, tasks)
    assert not begun, "nor is the other one pretrained first"


def test_what_an_evaluation_lacks_is_said_before_the_first_step(archive, tmp_path):
    with pytest.raises(ConfigError, match=r"no score 'knn/dise'; there are .*knn/dice, knn/dice/organ"):
        run_pretrain(config(keep_best={"score": "knn/dise"}), tmp_path / "run", archive=archive, quiet=True)
    small = config(evaluations={"knn": {**KNN, "modalities": ["PT"]}})
    with pytest.raises(UserError, match=r"no labeled training case .* of PT alone"):
        run_pretrain(small, tmp_path / "run", archive=archive, quiet=True)
    assert not (tmp_path / "run" / "last.ckpt").exists()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_collapse_that_an_evaluation_finds_is_warned_of(archive, tmp_path, monkeypatch):
    scores = [Score("effective_rank/CT", 1.0, "dimensions"), Score("distinct_crops/CT", 8.0, "crops")]
    monkeypatch.setattr(Health, "run", lambda self, model, archive: iter(scores))
    changed = config(evaluations={"health": {}}, keep_best=None, train={"steps": 1, "accelerator": "cpu"})
    run_pretrain(changed, tmp_path / "run", archive=archive, quiet=True)
    (told,) = (tmp_path / "run" / "warnings.txt").read_text().splitlines()
    assert "the encoder's features of CT scans collapse: effective_rank is 1" in told


@pytest.mark.slow
def test_the_look_at_step_0_counts_for_the_time_spent_on_looking(archive, tmp_path, monkeypatch):
    """It takes a second here, the later one nothing."""
    looks = []

    def run(self, model, archive):
        time.sleep(0.0 if looks else 1.0)
        looks.append(model)
        yield Score("rank", 1.0, "dimensions")

    monkeypatch.setattr(Health, "run", run)
    changed = config(
        evaluations={"health": {}},
        keep_best=None,
        train={"steps": 1, "preview_every": None, "accelerator": "cpu"},
    )
    began = time.perf_counter()
    run_pretrain(changed, tmp_path / "run", archive=archive, quiet=True)
    whole_s = time.perf_counter() - began
    (row,) = (row for row in metrics(tmp_path / "run") if "eval/health/rank" in row)
    assert len(looks) == 2
    assert 1 / whole_s < row["system/evaluate_share"] < 1


def test_pictures_and_cost_stand_in_the_run_folder(archive, tmp_path):
    probes = {"feature_pca": {"crop_size": [16, 16, 16], "scans": 2}}
    changed = config(
        evaluations=probes, keep_best=None, train={"steps": 1, "preview_every": None, "accelerator": "cpu"}
    )
    shipped = run_pretrain(changed, tmp_path / "run", archive=archive, quiet=True)
    assert sorted(p.name for p in (tmp_path / "run" / "images").iterdir()) == [
        "feature_pca-CT-s4-CT-0000001.png",
        "feature_pca-MR-s4-MR-0000001.png",
    ]
    (row,) = (row for row in metrics(tmp_path / "run") if "eval/feature_pca/variance/1" in row)
    assert 0 < row["system/evaluate_share"] < 1
    assert encoder_file.load_card(shipped).chosen_by is None


@pytest.mark.parametrize(
    ("steps", "batch", "every"), [(20_000, 4, 2000), (2000, 4, 250), (2000, 16, 200), (100, 3, 334)]
)
def test_the_interval_where_none_is_named(steps, batch, every):
    plain = config(train={"steps": steps}, data={"batch_size": batch})
    assert with_interval(plain, steps).evaluate_every.steps() == every
    assert with_interval(config(), 6).evaluate_every.steps() == 1, "what is named stays"


def test_few_crops_while_training_unless_the_config_says_so():
    built = build_evaluations({"health": {}, "knn": {"windows": 3}, "geometry": {"crops": 9}})
    assert (built["health"].config.crops, built["health"].config.subset) == (24, "development")
    assert (built["knn"].config.windows, built["knn"].config.scored) == (3, 6)
    assert (built["geometry"].config.crops, built["geometry"].config.scans) == (9, 8)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_evaluations_take_less_than_a_twentieth_of_the_time(archive, tmp_path):
    """At the default interval and options, with the smallest network, for which looking is dearest."""
    probes = {"knn": {}, "health": {}, "feature_pca": {}}
    changed = config(
        evaluations=probes,
        objective={"name": "mae", "size": [32, 32, 32]},
        data={"batch_size": 4},
        train={"steps": 251, "preview_every": None, "accelerator": "cpu", "ema": 0.9},
    )
    run_pretrain(changed, tmp_path / "run", archive=archive, quiet=True)
    evaluated = [row for row in metrics(tmp_path / "run") if "system/evaluate_share" in row]
    assert [row["step"] for row in evaluated] == [250, 251]
    assert evaluated[0]["system/evaluate_share"] < 0.05, "one evaluation in one interval"
