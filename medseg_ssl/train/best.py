"""The encoder with the best score so far, kept in the checkpoint: a continued run chooses as an unbroken one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from medseg_ssl.config import ConfigError
from medseg_ssl.train.settings import KeepBest

if TYPE_CHECKING:
    from medseg_ssl.objectives.base import Exported

PREFIX = "eval/"


class Best:
    """What ``keep_best`` asks for: weights of the evaluated step with the best score; of equal ones the first.

    Args:
        keep: which score, and what is better.
    """

    def __init__(self, keep: KeepBest) -> None:
        self.keep = keep
        self.step: int | None = None
        self.value = math.nan
        self._looks: list[int] = []
        self._weights: dict[str, dict[str, Tensor]] = {}

    def check(self, scores: Mapping[str, float]) -> None:
        """Refuse a score that the evaluation does not give.

        Raises:
            ConfigError: names the scores there are.
        """
        evaluation = self.keep.score.split("/")[0]
        if PREFIX + self.keep.score not in scores:
            known = [n.removeprefix(PREFIX) for n in scores if n.startswith(f"{PREFIX}{evaluation}/")]
            raise ConfigError(
                f"keep_best.score: no score {self.keep.score!r}; there are {', '.join(sorted(known))}"
            )

    def offer(self, step: int, scores: Mapping[str, float], exported: Exported) -> None:
        """Keep a copy of these modules' weights if their score is the best; one that is not finite never is.

        Args:
            step: that was evaluated.
            scores: as they are logged.
            exported: modules that hold the weights that were evaluated.
        """
        if step not in self._looks:  # an evaluation that was interrupted is repeated
            self._looks.append(step)
        value = float(scores.get(PREFIX + self.keep.score, math.nan))
        better = self.step is None or (value > self.value if self.keep.mode == "max" else value < self.value)
        if not math.isfinite(value) or not better:
            return
        self.step, self.value = step, value
        parts = {"encoder": exported.encoder, "decoder": exported.decoder}
        self._weights = {
            name: {key: tensor.detach().cpu().clone() for key, tensor in module.state_dict().items()}
            for name, module in parts.items()
            if module is not None
        }

    def put_back(self, exported: Exported) -> None:
        """Load the kept weights into the modules."""
        exported.encoder.load_state_dict(self._weights["encoder"])
        if exported.decoder is not None:
            exported.decoder.load_state_dict(self._weights["decoder"])

    def record(self, *, subset: str, steps: int) -> dict[str, Any]:
        """How the choice was made, for the card: score, its value, where it was taken, and among how many."""
        return {
            "score": self.keep.score,
            "mode": self.keep.mode,
            "value": self.value,
            "subset": subset,
            "step": self.step,
            "of_steps": steps,
            "candidates": len(self._looks),
        }

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"step": self.step, "value": self.value, "looks": self._looks, "weights": self._weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.step, self.value = state["step"], state["value"]
        self._looks, self._weights = list(state["looks"]), dict(state["weights"])
