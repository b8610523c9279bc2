"""The weights of the best evaluation so far, and whether it has been the best for long enough to stop."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from medseg_ssl.config import ConfigError


@dataclass(frozen=True)
class BestRule:
    """Which score decides.

    Attributes:
        score: its name, as the evaluations give it.
        larger_is_better: or the other way round.
        patience: evaluations without a better score after which a run ends; None never ends it.
    """

    score: str
    larger_is_better: bool = True
    patience: int | None = None


class _Memory(NamedTuple):
    # replaced as a whole, so that an interruption finds the state before an evaluation or the one after it
    seen: int = 0
    worse: int = 0
    step: int | None = None
    value: float = math.nan
    weights: Mapping[str, Tensor] = {}


class Best:
    """What the process that evaluates remembers of its evaluations."""

    def __init__(self, rule: BestRule) -> None:
        self.rule = rule
        self._memory = _Memory()

    @property
    def step(self) -> int | None:
        """Of the best weights; None before an evaluation gave a score."""
        return self._memory.step

    @property
    def finished(self) -> bool:
        """Whether the best score is older than the rule's patience."""
        return self.rule.patience is not None and self._memory.worse >= self.rule.patience

    def see(self, step: int, scores: Mapping[str, float], objective: nn.Module) -> None:
        """Take note of the evaluation of a step, and keep the weights where it is the best; once a step.

        Raises:
            ConfigError: the score is not among them.
        """
        now = self._memory
        if step <= now.seen:  # an interrupted set of actions runs again as a whole
            return
        if self.rule.score not in scores:
            raise ConfigError(f"no score named {self.rule.score!r}; the evaluations gave {', '.join(scores)}")
        value, sign = scores[self.rule.score], 1.0 if self.rule.larger_is_better else -1.0
        if math.isnan(value) or (now.step is not None and sign * value <= sign * now.value):
            self._memory = now._replace(seen=step, worse=now.worse + 1)
            return
        frozen = {name for name, p in objective.named_parameters() if not p.requires_grad}
        kept = {name: v.detach().clone() for name, v in objective.state_dict().items() if name not in frozen}
        self._memory = _Memory(seen=step, step=step, value=value, weights=kept)

    def settle(self, objective: nn.Module) -> None:
        """Leave the best weights in the objective for good; without an evaluation they stay as they are."""
        if self._memory.weights:
            objective.load_state_dict(self._memory.weights, strict=False)

    def state_dict(self) -> dict[str, Any]:
        """All of it, for the checkpoint."""
        return self._memory._asdict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put a saved state back."""
        self._memory = _Memory(**state)
