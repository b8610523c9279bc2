import math

import pytest
import torch

from medseg_ssl.config import ConfigError
from medseg_ssl.train.best import Best, BestRule
from medseg_ssl.train.runtime import Runtime
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
    best = Best(BestRule("eval/a/b", patience=2))
    see(best, objective, (2, 4, 6))
    assert (best.step, best.finished) == (4, False)
    see(best, objective, (6,))  # the same evaluation again, after an interruption
    assert not best.finished
    see(best, objective, (8,))  # as good is not better
    assert best.finished
    again = Best(BestRule("eval/a/b", patience=2))
    again.load_state_dict(best.state_dict())
    assert not {name for name in again.state_dict()["weights"] if name.startswith("encoder.")}
    again.settle(objective)
    assert objective.head.bias.item() == 4.0
    assert again.finished


def test_smaller_may_be_better_and_a_wrong_name_lists_the_scores():
    objective, best = TinyObjective(), Best(BestRule("eval/a/b", larger_is_better=False))
    see(best, objective, (2, 4, 8, 10))
    assert (best.step, best.finished) == (2, False)
    with pytest.raises(ConfigError, match=r"no score named 'eval/a/b'; the evaluations gave eval/a/c"):
        best.see(12, {"eval/a/c": 1.0}, objective)


def run(folder, **options):
    best = Best(BestRule("eval/a/b", patience=2))
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
