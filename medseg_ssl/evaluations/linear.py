"""Linear segmentation probe: one linear layer on frozen features, fitted to the voxels of a few labeled cases.

Multinomial logistic regression, fitted to the end from zero, so that no learning rate has a say; as linear probes judge
frozen features (Alain and Bengio, arXiv 1610.01644).
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType

import numpy as np
from pydantic import Field
from torch import Tensor

from medseg_ssl.evaluations._logistic import fit_logistic
from medseg_ssl.evaluations._voxels import Predict, VoxelConfig, VoxelProbe


class Linear(VoxelProbe):
    """Dice of a linear classifier of voxels."""

    class Config(VoxelConfig):
        """How strongly the classifier is held back.

        Attributes:
            penalty: weight of the squared coefficients (of standardised features) beside the mean loss.
        """

        penalty: float = Field(default=1e-3, gt=0)

    config: Config  # pyright: ignore[reportIncompatibleVariableOverride]
    sparing = MappingProxyType(
        {**VoxelProbe.sparing, "taught_voxels": 1024}
    )  # the fit takes most of the time

    def teach(
        self, taught: Tensor, label_N: np.ndarray, weight_K: np.ndarray, blocks: Sequence[int]
    ) -> Predict:
        """Fit the layer; a voxel weighs as its class does."""
        fitted = fit_logistic(taught.cpu().numpy(), label_N, weight_K, penalty=self.config.penalty)

        def predict(features: Tensor) -> np.ndarray:
            return fitted.scores(features.cpu().numpy().astype(np.float64)).argmax(axis=1)

        return predict
