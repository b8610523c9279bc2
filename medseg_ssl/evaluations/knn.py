"""Voxel kNN: what the nearest voxels of a few labeled cases say, in the space of frozen features.

Nothing is trained, so the score moves with the features alone; as nearest neighbours judge frozen image features (Wu
et al., arXiv 1805.01978; dense in arXiv 2306.01667). Features are standardised over the teaching voxels, and each level
of the pyramid counts alike, however many channels it has.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from medseg_ssl.evaluations._voxels import Predict, VoxelConfig, VoxelProbe

QUERIES = 2048
"""Voxels compared with all that teach at a time, so that memory stays in bounds."""


class KNN(VoxelProbe):
    """Dice of a vote of the nearest teaching voxels."""

    class Config(VoxelConfig):
        """How many neighbours vote.

        Attributes:
            neighbours: voxels that vote, fewer where fewer teach.
        """

        neighbours: int = Field(default=20, ge=1)

    config: Config  # pyright: ignore[reportIncompatibleVariableOverride]

    def teach(
        self, taught: Tensor, label_N: np.ndarray, weight_K: np.ndarray, blocks: Sequence[int]
    ) -> Predict:
        """Keep the voxels; a neighbour's vote weighs as its class does."""
        mean_E, spread_E = taught.mean(dim=0), taught.std(dim=0, correction=0)
        moves_E = spread_E > 1e-6 * taught.abs().mean(dim=0).clamp_min(1e-12)
        width_E = torch.tensor([n for n in blocks for _ in range(n)], device=taught.device)
        scale_E = moves_E / torch.where(moves_E, spread_E, 1.0) / width_E.sqrt()
        bank_NE = (taught - mean_E) * scale_E
        length_N = bank_NE.square().sum(dim=1)
        votes_NK = torch.nn.functional.one_hot(torch.from_numpy(label_N), len(weight_K)).to(taught.device)
        votes_NK = votes_NK * torch.from_numpy(weight_K).to(taught.device)
        count = min(self.config.neighbours, len(bank_NE))

        def predict(features: Tensor) -> np.ndarray:
            said = []
            for part in features.split(QUERIES):
                # the query's own length moves no neighbour before another
                far_PN = length_N - 2 * ((part - mean_E) * scale_E) @ bank_NE.T
                nearest_PA = far_PN.topk(count, dim=1, largest=False).indices
                said.append(votes_NK[nearest_PA].sum(dim=1).argmax(dim=1).cpu())
            return torch.cat(said).numpy() if said else np.zeros(0, dtype=np.int64)

        return predict
