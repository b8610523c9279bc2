"""An exponential moving average of the weights, which is what a run ships where it keeps one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class Average:
    """Moving average of the trainable parameters; without a decay it holds and does nothing.

    The decay rises with the steps as min(decay, (1 + step) / (10 + step)), so that a short run is not held back by
    its random start.
    """

    def __init__(self, objective: nn.Module, *, decay: float | None) -> None:
        self.decay = decay
        self._live = (
            {} if decay is None else {n: p for n, p in objective.named_parameters() if p.requires_grad}
        )
        self._mean = {name: p.detach().clone() for name, p in self._live.items()}

    def update(self, step: int) -> None:
        """Take in the weights after ``step`` steps."""
        if self.decay is not None:
            blend = get_ema_multi_avg_fn(min(self.decay, (1 + step) / (10 + step)))
            blend(list(self._mean.values()), list(self._live.values()), step)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the context the objective holds the averaged weights."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def settle(self) -> None:
        """Leave the averaged weights in the objective for good."""
        self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, live in self._live.items():
            kept = live.detach().clone()
            live.copy_(self._mean[name])
            self._mean[name].copy_(kept)

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights by name."""
        return dict(self._mean)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Put saved averages back."""
        for name, mean in self._mean.items():
            mean.copy_(state[name])
