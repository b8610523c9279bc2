"""``keep_best``: the best evaluated weights, of equal ones the first, also over a checkpoint."""

import math

import pytest
import torch

from medseg_ssl.config import ConfigError, parse
from medseg_ssl.objectives.base import Exported
from medseg_ssl.train.best import Best
from medseg_ssl.train.health import alarms
from medseg_ssl.train.settings import KeepBest
from tests.train.conftest import TinyEncoder


def exported(value):
    encoder = TinyEncoder()
    with torch.no_grad():
        encoder.first.bias.fill_(value)
    return Exported(encoder, None)


def offer_all(best, values):
    for step, value in values.items():
        best.offer(step, {"eval/knn/dice": value}, exported(float(step)))
    return best


@pytest.mark.parametrize(("mode", "step"), [("max", 20), ("min", 30)])
def test_the_best_and_of_equal_ones_the_first(mode, step):
    best = Best(KeepBest(score="knn/dice", mode=mode))
    offer_all(best, {10: 0.5, 20: 0.7, 30: 0.2, 40: 0.7, 50: 0.2, 60: math.nan})
    assert best.step == step
    assert best.record(subset="development", steps=60) == {
        "score": "knn/dice",
        "mode": mode,
        "value": {20: 0.7, 30: 0.2}[step],
        "subset": "development",
        "step": step,
        "of_steps": 60,
        "candidates": 6,
    }
    target = exported(0.0)
    best.put_back(target)
    assert (target.encoder.first.bias == step).all()


def test_what_is_kept_does_not_move_with_the_weights():
    best, live = Best(KeepBest(score="knn/dice")), exported(1.0)
    best.offer(1, {"eval/knn/dice": 0.5}, live)
    with torch.no_grad():
        live.encoder.first.bias.fill_(9.0)
    best.put_back(live)
    assert (live.encoder.first.bias == 1.0).all()


def test_a_continued_run_chooses_as_an_unbroken_one(tmp_path):
    values = {10: 0.5, 20: 0.7, 30: 0.6, 40: 0.7}
    whole = offer_all(Best(KeepBest(score="knn/dice")), values)
    broken = offer_all(Best(KeepBest(score="knn/dice")), {10: 0.5, 20: 0.7})
    torch.save(broken.state_dict(), tmp_path / "state")
    offer_all(broken, {30: 0.9})  # lost with the process
    continued = Best(KeepBest(score="knn/dice"))
    continued.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    offer_all(continued, {20: 0.7, 30: 0.6, 40: 0.7})  # the interrupted evaluation is repeated
    assert continued.record(subset="", steps=40) == whole.record(subset="", steps=40)


def test_nothing_finite_keeps_nothing():
    best = offer_all(Best(KeepBest(score="knn/dice")), {10: math.nan, 20: math.inf})
    assert best.step is None


def test_refusals():
    best = Best(KeepBest(score="knn/dize"))
    with pytest.raises(
        ConfigError, match=r"no score 'knn/dize'; there are cases, dice|there are knn/cases, knn/dice$"
    ):
        best.check({"eval/knn/dice": 0.1, "eval/knn/cases": 4, "eval/health/rank": 3})
    with pytest.raises(ConfigError, match="'dice' is no '<evaluation>/<score>'"):
        parse(KeepBest, {"score": "dice"})


def test_alarms_of_frozen_features():
    quiet = {"eval/health/effective_rank/CT": 9.0, "eval/health/std_relative/CT": 0.2, "eval/knn/dice": 0.0}
    assert not list(alarms(quiet))
    loud = list(alarms({**quiet, "eval/health/effective_rank/MR": 1.2, "eval/own/std_relative/all": 1e-5}))
    assert [text.split(";")[0] for text in loud] == [
        "the encoder's features of MR scans collapse: effective_rank is 1.2",
        "the encoder's features of all scans collapse: std_relative is 1e-05",
    ]
    assert not list(alarms({"eval/health/effective_rank/CT": math.nan}))
