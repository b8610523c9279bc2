"""Multinomial logistic regression on frozen features: convex and started at zero: equal inputs, equal answers."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

STEPS = 200


class Fitted(NamedTuple):
    """A fitted linear classifier."""

    mean_E: np.ndarray
    scale_E: np.ndarray
    weight_KE: np.ndarray
    bias_K: np.ndarray

    def scores(self, features_NE: np.ndarray) -> np.ndarray:
        """Unnormalised log probabilities (N, K)."""
        return ((features_NE - self.mean_E) * self.scale_E) @ self.weight_KE.T + self.bias_K


def fit_logistic(
    features_NE: np.ndarray, class_N: np.ndarray, weight_K: np.ndarray, *, penalty: float
) -> Fitted:
    """Fit by L-BFGS on standardised features.

    Args:
        features_NE: of the samples.
        class_N: int from 0 to K - 1.
        weight_K: weight of a sample of each class; only ratios count. A class without samples is never predicted.
        penalty: half the weight of the squared coefficients beside the mean loss; the bias is free.
    """
    from scipy.optimize import minimize

    features_NE = features_NE.astype(np.float64)
    mean_E, spread_E = features_NE.mean(axis=0), features_NE.std(axis=0)
    moves_E = spread_E > 1e-6 * np.maximum(np.abs(features_NE).mean(axis=0), 1e-12)
    scale_E = np.where(moves_E, 1 / np.where(moves_E, spread_E, 1.0), 0.0)
    x_NE = (features_NE - mean_E) * scale_E
    n, e = x_NE.shape
    k = len(weight_K)
    present_K = np.bincount(class_N, minlength=k) > 0
    weight_N = weight_K[class_N] / weight_K[class_N].sum()
    never_K = np.where(present_K, 0.0, -np.inf)

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        coefficients = flat.reshape(k, e + 1)
        logits_NK = x_NE @ coefficients[:, :e].T + coefficients[:, e] + never_K
        logits_NK -= logits_NK.max(axis=1, keepdims=True)
        total_N = np.exp(logits_NK).sum(axis=1)
        value = float(weight_N @ (np.log(total_N) - logits_NK[np.arange(n), class_N]))
        value += penalty / 2 * float(np.square(coefficients[:, :e]).sum())
        error_NK = np.exp(logits_NK) / total_N[:, None]
        error_NK[np.arange(n), class_N] -= 1
        error_NK *= weight_N[:, None]
        slope = np.concatenate(
            [error_NK.T @ x_NE + penalty * coefficients[:, :e], error_NK.sum(axis=0)[:, None]], axis=1
        )
        return value, slope.ravel()

    found = minimize(loss, np.zeros(k * (e + 1)), jac=True, method="L-BFGS-B", options={"maxiter": STEPS})
    coefficients = found.x.reshape(k, e + 1)
    return Fitted(mean_E, scale_E, coefficients[:, :e], coefficients[:, e] + never_K)
