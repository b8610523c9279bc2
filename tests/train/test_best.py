"""``keep_best``: the best evaluated weights, of equal ones the first, also over a checkpoint; and when to stop."""

import math

import pytest
import torch

from medseg_ssl.config import ConfigError, parse
from medseg_ssl.nets.teacher import Teacher
from medseg_ssl.train.best import Best
from medseg_ssl.train.health import alarms
from medseg_ssl.train.runtime import Runtime
from medseg_ssl.train.settings import KeepBest
from tests.train.conftest import TinyObjective, run_tiny, same, weights

SCORES = {2: 0.3, 4: 0.7, 6: math.nan, 8: 0.7, 10: 0.9}


def see(best, objective, steps):
    for step in steps:
        with torch.no_grad():
            objective.head.bias.fill_(float(step))
        best.see(step, {"eval/a/b": SCORES[step]}, objective)


def test_the_best_weights_are_kept_and_patience_ends():
    objective = TinyObjective()
    objective.encoder.requires_grad_(False)
    best = Best(KeepBest(score="a/b", patience=2))
    see(best, objective, (2, 4, 6))
    assert (best.step, best.finished) == (4, False)
    see(best, objective, (6,))  # the same evaluation again, after an interruption
    assert not best.finished
    see(best, objective, (8,))  # as good is not better
    assert best.finished
    again = Best(KeepBest(score="a/b", patience=2))
    again.load_state_dict(best.state_dict())
    assert not {name for name in again.state_dict()["weights"] if name.startswith("encoder.")}
    again.settle(objective)
    assert objective.head.bias.item() == 4.0
    assert again.finished


def test_a_teacher_which_moves_without_gradients_is_kept_too():
    """Of jepa it is what ships; the last teacher under the best step's name would be another network."""
    objective = TinyObjective()
    objective.teacher = Teacher(objective.encoder)
    best = Best(KeepBest(score="a/b"))
    names = [name for name, _ in objective.teacher.named_parameters()]
    for step, value in ((2, 0.5), (4, 0.4)):
        with torch.no_grad():
            for parameter in objective.teacher.parameters():
                parameter.fill_(float(step))
        best.see(step, {"eval/a/b": value}, objective)
    assert names
    best.settle(objective)
    assert all((parameter == 2.0).all() for parameter in objective.teacher.parameters())


def test_smaller_may_be_better_and_a_wrong_name_lists_the_scores():
    objective, best = TinyObjective(), Best(KeepBest(score="a/b", mode="min"))
    see(best, objective, (2, 4, 8, 10))
    assert (best.step, best.finished) == (2, False)
    with pytest.raises(ConfigError, match=r"no score 'a/b'; there are a/c, a/d$"):
        best.see(12, {"eval/a/c": 1.0, "eval/a/d": 2.0, "eval/b/b": 3.0}, objective)
    with pytest.raises(ConfigError, match="'dice' is no '<evaluation>/<score>'"):
        parse(KeepBest, {"score": "dice"})


def test_the_choice_is_recorded():
    objective, best = TinyObjective(), Best(KeepBest(score="a/b"))
    see(best, objective, (2, 4, 6, 8, 8))
    assert best.record(subset="development", steps=60) == {
        "score": "a/b",
        "mode": "max",
        "value": 0.7,
        "subset": "development",
        "step": 4,
        "of_steps": 60,
        "candidates": 4,
    }


def test_nothing_finite_keeps_nothing():
    objective, best = TinyObjective(), Best(KeepBest(score="a/b"))
    for step, value in ((1, math.nan), (2, math.inf)):
        best.see(step, {"eval/a/b": value}, objective)
    assert best.step is None
    before = weights(objective)
    best.settle(objective)
    assert same(weights(objective), before)


def run(folder, **options):
    best = Best(KeepBest(score="a/b", patience=2))
    seen = {}

    def evaluate(step):
        seen[step] = weights(objective_of[0])
        best.see(step, {"eval/a/b": SCORES[step]}, objective_of[0])

    objective_of = []
    original = TinyObjective.__init__

    def remembered(self, *args, **kwargs):
        original(self, *args, **kwargs)
        objective_of.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TinyObjective, "__init__", remembered)
        objective, result = run_tiny(
            folder, steps=12, ema=0.9, actions=[(2, evaluate)], best=best, save_every=3, **options
        )
    best.settle(objective)
    return objective, result, seen, best


def test_a_run_ends_early_with_its_best_average_and_continues_exactly(tmp_path, monkeypatch):
    objective, result, seen, best = run(tmp_path / "whole")
    assert (result.step, best.step, sorted(seen)) == (8, 4, [2, 4, 6, 8])
    assert same(weights(objective), seen[4])
    seed_step = Runtime.seed_step

    def breaks(self, seed, step):
        if step == 7:
            raise ConnectionError("the power went out")
        seed_step(self, seed, step)

    monkeypatch.setattr(Runtime, "seed_step", breaks)
    with pytest.raises(ConnectionError):
        run(tmp_path / "broken")
    monkeypatch.undo()
    continued, result, seen, best = run(tmp_path / "broken")
    assert (result.step, best.step, sorted(seen)) == (8, 4, [8])
    assert same(weights(continued), weights(objective))
    again, result, seen, _ = run(tmp_path / "broken")  # it ended, though not with its last step
    assert (result.step, seen) == (8, {})
    assert same(weights(again), weights(objective))


def test_alarms_of_frozen_features():
    quiet = {"eval/health/effective_rank/CT": 9.0, "eval/health/std_relative/CT": 0.2, "eval/knn/dice": 0.0}
    assert not list(alarms(quiet))
    loud = list(alarms({**quiet, "eval/health/effective_rank/MR": 1.2, "eval/own/std_relative/all": 1e-5}))
    assert [text.split(";")[0] for text in loud] == [
        "the encoder's features of MR scans collapse: effective_rank is 1.2",
        "the encoder's features of all scans collapse: std_relative is 1e-05",
    ]
    assert not list(alarms({"eval/health/effective_rank/CT": math.nan}))


@pytest.mark.parametrize(("kind", "enough"), [("effective_rank", 8), ("std_relative", 2)])
def test_few_distinct_crops_alarm_nobody(kind, enough):
    low = {f"eval/health/{kind}/CT": 0.0}
    assert not list(alarms({**low, "eval/health/distinct_crops/CT": enough - 1.0}))
    assert list(alarms({**low, "eval/health/distinct_crops/CT": float(enough)}))
    assert list(alarms({**low, "eval/other/distinct_crops/CT": 1.0, "eval/health/distinct_crops/MR": 1.0}))
