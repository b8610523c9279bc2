"""The weights of the best evaluation so far, kept in the checkpoint: a continued run chooses as an unbroken one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from medseg_ssl.config import ConfigError
from medseg_ssl.objectives.base import still_parameters
from medseg_ssl.train.settings import KeepBest

PREFIX = "eval/"


class _Memory(NamedTuple):
    # replaced as a whole, so that an interruption finds the state before an evaluation or the one after it
    seen: int = 0
    looks: int = 0
    worse: int = 0
    step: int | None = None
    value: float = math.nan
    weights: Mapping[str, Tensor] = {}


class Best:
    """What the process that evaluates remembers of its evaluations; of equal scores the first counts.

    Args:
        keep: which score, what is better, and how long none may be better.
    """

    def __init__(self, keep: KeepBest) -> None:
        self.keep = keep
        self._memory = _Memory()

    @property
    def step(self) -> int | None:
        """Of the best weights; None before an evaluation gave a finite score."""
        return self._memory.step

    @property
    def finished(self) -> bool:
        """Whether the best score is older than the patience."""
        return self.keep.patience is not None and self._memory.worse >= self.keep.patience

    def check(self, scores: Mapping[str, float]) -> float:
        """The score that decides.

        Raises:
            ConfigError: it is not among these; the evaluation's scores are named.
        """
        name = self.keep.score
        if PREFIX + name not in scores:
            evaluation = name.split("/")[0]
            known = [n.removeprefix(PREFIX) for n in scores if n.startswith(f"{PREFIX}{evaluation}/")]
            raise ConfigError(
                f"keep_best.score: no score {name!r}; there are {', '.join(sorted(known)) or 'none'}"
            )
        return float(scores[PREFIX + name])

    def see(self, step: int, scores: Mapping[str, float], objective: nn.Module) -> None:
        """Take note of the evaluation of a step, and keep the weights where it is the best; once a step.

        Args:
            step: that was evaluated.
            scores: as they are logged, ``eval/<evaluation>/<score>``.
            objective: holds the weights that were evaluated.

        Raises:
            ConfigError: see ``check``.
        """
        now = self._memory
        if step <= now.seen:  # an interrupted set of actions runs again as a whole
            return
        value, sign = self.check(scores), 1.0 if self.keep.mode == "max" else -1.0
        now = now._replace(seen=step, looks=now.looks + 1)
        if not math.isfinite(value) or (now.step is not None and sign * value <= sign * now.value):
            self._memory = now._replace(worse=now.worse + 1)
            return
        still = still_parameters(objective)
        kept = {name: v.detach().clone() for name, v in objective.state_dict().items() if name not in still}
        self._memory = now._replace(worse=0, step=step, value=value, weights=kept)

    def settle(self, objective: nn.Module) -> None:
        """Leave the best weights in the objective for good; without a finite score they stay as they are."""
        if self._memory.weights:
            objective.load_state_dict(self._memory.weights, strict=False)

    def record(self, *, subset: str, steps: int) -> dict[str, Any]:
        """How the choice was made, for the card: score, its value, where it was taken, and among how many."""
        return {
            "score": self.keep.score,
            "mode": self.keep.mode,
            "value": self._memory.value,
            "subset": subset,
            "step": self.step,
            "of_steps": steps,
            "candidates": self._memory.looks,
        }

    def state_dict(self) -> dict[str, Any]:
        """All of it, for the checkpoint."""
        return self._memory._asdict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put a saved state back."""
        self._memory = _Memory(**state)
