"""A teacher: the moving average of a student, which sets targets and learns nothing itself."""

from __future__ import annotations

import copy
from typing import Generic, Self, TypeVar

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

N = TypeVar("N", bound=nn.Module)


def rising_momentum(momentum: float, risen: float) -> float:
    """Momentum of a teacher that is yet to become steady: 0 at ``risen`` 0, ``momentum`` at 1.

    In between the number of steps it averages, 1 / (1 − momentum), grows geometrically. So a teacher leaves its random
    start behind at once (mean teacher takes min(1 − 1/step, momentum) for that), and needs no count of steps.
    """
    return 1.0 - (1.0 - momentum) ** risen


class Teacher(nn.Module, Generic[N]):
    """A copy of a network that follows it slowly (mean teacher, arXiv 1703.01780); always in eval mode.

    It needs no gradient, is no part of the optimizer, and is in the objective's state dict, so that a run resumes
    exactly. Call ``network`` under ``torch.no_grad()``: a student's parameters may run into the same loss.

    Attributes:
        network: the copy.
    """

    network: N

    def __init__(self, student: N) -> None:
        super().__init__()
        self.network = copy.deepcopy(student).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode: a teacher that drops paths would set noisy targets."""
        return super().train(False)

    @torch.no_grad()
    def follow(self, student: N, *, momentum: float) -> None:
        """Take a step towards the student: momentum · teacher + (1 − momentum) · student.

        Buffers are taken over as they are: they hold counts and running statistics, which average themselves.

        Args:
            student: the network this one was copied from.
            momentum: of this step, from 0 (become the student) to 1 (stay); see ``schedules.momentum``.
        """
        blend = get_ema_multi_avg_fn(momentum)
        blend(list(self.network.parameters()), list(student.parameters()), 0)
        for mine, its in zip(self.network.buffers(), student.buffers(), strict=True):
            mine.copy_(its)
