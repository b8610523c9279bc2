"""Incremental learning: a segmenter goes on with a class it did not know, and what it forgot is counted."""

import csv
import json

import numpy as np
import pytest
import torch

from finetune.continuing import check_card
from finetune.evaluate import main as evaluate
from finetune.run import main
from medseg_ssl.config import ConfigError, UserError
from medseg_ssl.data.archive import Archive
from medseg_ssl.inference.predictor import Predictor
from medseg_ssl.nets import encoder_file
from tests.train.archives import write_archive

COMMON = [
    "encoder.features=[4,8,8,8]",
    "objective.size=[16,16,16]",
    "data.batch_size=2",
    "train.accelerator=cpu",
    "wandb.mode=disabled",
    "train.preview_every=null",
    "--quiet",
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """An old archive of 'organ', a new one of 'lesion', and a segmenter of the former."""
    folder = tmp_path_factory.mktemp("continuing")
    old = write_archive(folder / "old").path
    new = write_archive(folder / "new", classes=("background", "lesion")).path
    words = ["segmentation", str(folder / "run"), "--archive", str(old), "train.steps=3", "optim.lr=0.01"]
    return old, new, main([*words, "train.ema=null", *COMMON])


def goes_on(world, run, *more, steps=2):
    words = ["distillation", str(run), "--archive", str(world[1]), "--continue-from", str(world[2])]
    return main([*words, f"train.steps={steps}", *COMMON, *more])


def test_old_classes_keep_their_answers_and_new_ones_stand_behind(world, tmp_path):
    """Without a step that moves it, it says of the old class what it said, and of the new one a share of background."""
    shipped = goes_on(world, tmp_path / "run", "optim.lr=1e-12", "optim.weight_decay=0", steps=1)
    assert encoder_file.load_card(shipped).classes == ("background", "organ", "lesion")
    archive = Archive.open(world[0])
    before, after = (
        next(Predictor.load(path).case_probabilities(archive, ["case-s6"]))[1] for path in (world[2], shipped)
    )
    assert np.allclose(after[1], before[1], atol=1e-5)
    assert np.allclose(after[0], before[0] / 2, atol=1e-5)
    assert np.allclose(after[0], after[2], atol=1e-6)


def test_forgetting_is_counted_on_the_old_archive(world, tmp_path):
    shipped = goes_on(world, tmp_path / "run")
    log = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert "train/distillation" in log[-1]
    words = [str(shipped), str(tmp_path / "old"), "--archive", str(world[0])]
    evaluate([*words, "--before", str(world[2])])
    with (tmp_path / "old" / "forgetting.csv").open(newline="") as file:
        rows = {(r["class"], r["metric"]): r for r in csv.DictReader(file)}
    found = rows["organ", "dice"]
    assert found["cases"] == "2"
    summary = json.loads((tmp_path / "old" / "summary.json").read_text())
    assert float(found["after"]) == pytest.approx(summary["metrics"]["dice"]["mean"], abs=1e-5)
    assert float(found["difference"]) == pytest.approx(
        float(found["after"]) - float(found["before"]), abs=1e-5
    )
    with pytest.raises(ConfigError, match="compares with another segmenter"):
        evaluate([*words, "--before", str(shipped)])


@pytest.mark.slow
def test_a_broken_run_continues_exactly(world, tmp_path, monkeypatch):
    from medseg_ssl.train.runtime import Runtime

    options = ["train.save_every=1", "train.ema=0.9"]
    whole = goes_on(world, tmp_path / "whole", *options, steps=3)
    seed_step = Runtime.seed_step

    def breaks(self, seed, step):
        if step == 2:
            raise ConnectionError("the power went out")
        seed_step(self, seed, step)

    monkeypatch.setattr(Runtime, "seed_step", breaks)
    with pytest.raises(ConnectionError):
        goes_on(world, tmp_path / "broken", *options, steps=3)
    monkeypatch.undo()
    broken = goes_on(world, tmp_path / "broken", *options, steps=3)
    states = [encoder_file.build(path).segmenter().state_dict() for path in (whole, broken)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_what_does_not_go_together_is_refused(world, tmp_path):
    old, new, segmenter = world
    words = ["distillation", str(tmp_path / "run"), "--archive", str(new), *COMMON]
    with pytest.raises(ConfigError, match="goes on from a segmenter; name it by --continue-from"):
        main(words)
    with pytest.raises(ConfigError, match="give one of them"):
        main([*words, "--continue-from", str(segmenter), "--encoder", str(segmenter)])
    with pytest.raises(UserError, match="the segmenter knows the classes background, organ, the archive has"):
        evaluate([str(segmenter), str(tmp_path / "scores"), "--archive", str(new)])
    assert not (tmp_path / "run").exists()
    assert old != new


def test_another_spacing_intensity_or_order_of_channels_is_told_all_at_once(world, tmp_path):
    old, new, segmenter = world
    archive, card = Archive.open(new), encoder_file.load_card(segmenter)
    check_card(card, archive)
    other = {"CT": {**card.intensity["CT"], "low": -77.0}}
    with pytest.raises(ConfigError) as error:
        check_card(card.model_copy(update={"spacing_mm": (3.0, 1.0, 1.5), "intensity": other}), archive)
    assert "spacing_mm of the archive is [1.0, 1.0, 1.0] mm, the segmenter's is [3.0, 1.0, 1.5] mm" in str(
        error.value
    )
    assert "prepare the archive with spacing_mm: [3.0, 1.0, 1.5]" in str(error.value)
    assert "normalises CT by" in str(error.value)
    archive.recipe = archive.recipe.model_copy(update={"spacing_mm": (3.01, 1.0, 1.5)})
    check_card(card.model_copy(update={"spacing_mm": (3.0, 1.0, 1.5)}), archive)
    for known, told in (
        ((3.0, 1.0, 1.2), r"\[3.01, 1.0, 1.5\] mm, the segmenter's is"),
        (None, "spacing_mm: null"),
    ):
        with pytest.raises(ConfigError, match=told):
            check_card(card.model_copy(update={"spacing_mm": known}), archive)
    two = write_archive(tmp_path / "two", channels=("CT", "MR"))
    turned = card.model_copy(update={"channels_in": 2, "modalities": ("MR", "CT")})
    with pytest.raises(ConfigError, match=r"has the channels CT\+MR, the segmenter's order is MR\+CT"):
        check_card(turned, two)
    assert old != new
