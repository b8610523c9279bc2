"""Signs of a run's health: finite losses, running means without host syncs, and the rank of the features."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from medseg_ssl.config import UserError

ROWS_KEPT = 256
"""Pooled features kept for the rank; more rows would not change the verdict, only its cost."""
FEWEST_ROWS = 16
COLLAPSED_RANK = 2.0
COLLAPSED_SPREAD = 1e-3
FEWEST_CROPS = {"effective_rank": 8, "std_relative": 2}
"""Distinct crops below which a score says nothing of a collapse: two have rank 1, one has no spread, in any encoder."""


def effective_rank(features_NE: Tensor) -> float:
    """Exponential of the entropy of the singular values (RankMe, arXiv 2210.02885), of centred features.

    Centring is ours: pooled features after a ReLU-like layer share a large mean, which would hide both health and
    collapse. Features that differ by less than a thousandth of their size have rank 1.

    Args:
        features_NE: (N, E), N at least 2.

    Returns:
        Between 1 and min(N - 1, E).
    """
    features_NE = features_NE.double()
    centred_NE = features_NE - features_NE.mean(0)
    size = float(features_NE.square().mean().sqrt())
    if size == 0.0 or float(centred_NE.square().mean().sqrt()) < COLLAPSED_SPREAD * size:
        return 1.0
    # the smaller Gram matrix has the same nonzero spectrum and is much cheaper than an SVD of (N, E)
    n, e = centred_NE.shape
    gram = centred_NE @ centred_NE.T if n <= e else centred_NE.T @ centred_NE
    values = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    share = values / values.sum()
    return float(torch.exp(-(share * torch.log(share.clamp_min(1e-12))).sum()))


class FeatureRank:
    """The newest pooled features of a run and their effective rank."""

    def __init__(self) -> None:
        self._blocks: deque[Tensor] = deque()
        self._rows = 0

    def add(self, features_BE: Tensor | None) -> None:
        """Keep a block of pooled features (B, E); nothing is read from the device."""
        if features_BE is None:
            return
        if self._blocks and self._blocks[0].shape[1] != features_BE.shape[1]:
            self._blocks.clear()
            self._rows = 0
        self._blocks.append(features_BE.detach())
        self._rows += features_BE.shape[0]
        while self._rows - self._blocks[0].shape[0] >= ROWS_KEPT:
            self._rows -= self._blocks.popleft().shape[0]

    def state_dict(self) -> dict[str, list[Tensor]]:
        """The rows that this process keeps, for the checkpoint."""
        # copies: of a view the whole storage would be saved
        return {"blocks": [block.clone() for block in self._blocks]}

    def load_state_dict(self, state: Mapping[str, list[Tensor]], *, device: torch.device) -> None:
        """Put saved rows back; an empty state leaves all as it is."""
        for block in state.get("blocks", []):
            self.add(block.to(device))

    def value(self) -> float | None:
        """Effective rank, or None while there are too few rows to tell."""
        if self._rows < FEWEST_ROWS:
            return None
        features_NE = torch.cat(tuple(self._blocks)).float().cpu()
        return effective_rank(features_NE) if bool(torch.isfinite(features_NE).all()) else None


def alarms(scores: Mapping[str, float]) -> Iterator[str]:
    """What frozen-feature scores say of a collapse, in words.

    Args:
        scores: by name, as they are logged: ``eval/<evaluation>/effective_rank/<scans>`` below 2, or
            ``eval/<evaluation>/std_relative/<scans>`` below a thousandth, is a collapse, unless the number
            ``eval/<evaluation>/distinct_crops/<scans>`` beside it says that too few crops were looked at.
    """
    least = {"effective_rank": COLLAPSED_RANK, "std_relative": COLLAPSED_SPREAD}
    for name, value in scores.items():
        head, evaluation, kind, *scans = name.split("/") if name.count("/") >= 3 else ("", "", "")
        if kind not in least or not value < least[kind]:
            continue
        crops = scores.get("/".join((head, evaluation, "distinct_crops", *scans)), math.inf)
        if crops >= FEWEST_CROPS[kind]:
            yield (
                f"the encoder's features of {'/'.join(scans)} scans collapse: {kind} is {value:.3g}; lower optim.lr, or"
                " give the objective more samples per batch"
            )


class FiniteGuard:
    """Stops a run at a loss or gradient that is not finite, before it reaches a checkpoint.

    On the CPU the check comes before the optimizer step. On a GPU reading the loss at once would stall the queue of
    kernels, so the flag travels to the host beside the next step and is read there: one update with broken gradients
    may run in memory, but the run stops before anything of it is saved.
    """

    def __init__(self, device: torch.device) -> None:
        self._later = device.type == "cuda"
        self._pending: deque[tuple[int, Tensor, torch.cuda.Event | None, list[tuple[str, ...]]]] = deque()

    def add(self, step: int, loss: Tensor, gradient_norm: Tensor, scans: list[tuple[str, ...]]) -> None:
        """Check one step, given the sum of its losses, its gradient's norm and the keys of its scans.

        Raises:
            UserError: this step's (on a GPU: the step before's) loss or gradient is not finite.
        """
        values = torch.stack((loss.detach().float(), gradient_norm.detach().float()))
        done = None
        if self._later:
            values = values.to("cpu", non_blocking=True)
            done = torch.cuda.Event()
            done.record()
        self._pending.append((step, values, done, scans))
        self.check(keep=1 if self._later else 0)

    def check(self, *, keep: int = 0) -> None:
        """Read all but the newest ``keep`` steps.

        Raises:
            UserError: one of them is not finite.
        """
        while len(self._pending) > keep:
            step, values, done, scans = self._pending.popleft()
            if done is not None:
                done.synchronize()
            loss, norm = values.tolist()
            if not (_finite(loss) and _finite(norm)):
                what = f"the loss is {loss}" if not _finite(loss) else f"the gradient's norm is {norm}"
                names = ", ".join("+".join(keys) for keys in scans) or "unknown"
                raise UserError(
                    f"{what} at step {step + 1}; scans in this batch: {names}; the last checkpoint is"
                    " intact: look at these scans (medseg-ssl inspect), or lower optim.lr"
                )


def _finite(value: float) -> bool:
    return value - value == 0.0


class Means:
    """Running means of scalars that stay on the device until they are read."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, **values: Tensor) -> None:
        """Add one value per name."""
        for name, value in values.items():
            value = value.detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Sums and counts of this process since the last call of ``take``, for the checkpoint.

        The main process' are saved: with several, the line into which an interruption falls is that one's alone.
        """
        return {"sums": dict(self._sums), "counts": dict(self._counts)}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]], *, device: torch.device) -> None:
        """Put saved sums back; an empty state leaves all as it is."""
        self._sums |= {name: total.to(device) for name, total in state.get("sums", {}).items()}
        self._counts |= state.get("counts", {})

    def take(self) -> dict[str, Tensor]:
        """The means since the last call, still on the device; starts anew."""
        means = {name: total / self._counts[name] for name, total in self._sums.items()}
        self._sums, self._counts = {}, {}
        return means
