"""How alike two representations are, and how well one suits a labeled task, from features alone.

Suffix letters: B minibatches, N examples, E features, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

FEWEST_EXAMPLES = 4
"""The unbiased estimator divides by N - 3."""
ROUNDS = 100
CLOSE = 1e-6


# -- centered kernel alignment -------------------------------------------------------------------------------


def centred_gram(features_BNE: np.ndarray) -> np.ndarray:
    """U-centred linear Gram matrices (B, N, N) of B minibatches, with a zero diagonal.

    The mean of products of two such matrices is the unbiased estimator of HSIC (Song et al. 2012, JMLR 13; in the form
    of Székely and Rizzo 2014, arXiv 1310.2926), so that unrelated features give 0 on average however many
    there are. Several minibatches are averaged as in arXiv 2010.15327.

    Raises:
        ValueError: not three dimensions, or fewer than 4 examples in a minibatch.
    """
    if features_BNE.ndim != 3 or features_BNE.shape[1] < FEWEST_EXAMPLES:
        raise ValueError(
            f"expected (minibatches, {FEWEST_EXAMPLES} or more examples, features), got {features_BNE.shape}"
        )
    # shifting all examples changes nothing after centring, and keeps a large common mean out of the rounding
    features_BNE = features_BNE - features_BNE.mean(axis=1, keepdims=True, dtype=np.float64)
    gram_BNN = features_BNE @ features_BNE.transpose(0, 2, 1)
    n = gram_BNN.shape[1]
    diagonal = np.arange(n)
    gram_BNN[:, diagonal, diagonal] = 0.0
    row_BN = gram_BNN.sum(axis=2) / (n - 2)
    total_B = gram_BNN.sum(axis=(1, 2)) / ((n - 1) * (n - 2))
    gram_BNN = gram_BNN - row_BN[:, :, None] - row_BN[:, None] + total_B[:, None, None]
    gram_BNN[:, diagonal, diagonal] = 0.0
    return gram_BNN


def alignment(first_BNN: np.ndarray, second_BNN: np.ndarray) -> float:
    """Linear CKA from two ``centred_gram`` of the same examples; NaN where one side says the same of all.

    1 for features that are rotations and multiples of each other, about 0 for unrelated ones; the unbiased estimate may
    fall below 0 (Kornblith et al., arXiv 1905.00414).

    Raises:
        ValueError: matrices of different examples.
    """
    if first_BNN.shape != second_BNN.shape:
        raise ValueError(
            f"Gram matrices must be of the same examples, got {first_BNN.shape}, {second_BNN.shape}"
        )
    scale = float(np.square(first_BNN).sum()) * float(np.square(second_BNN).sum())
    return float((first_BNN * second_BNN).sum() / np.sqrt(scale)) if scale > 0 else float("nan")


def linear_cka(first_NE: np.ndarray, second_NE: np.ndarray) -> float:
    """``alignment`` of two tables of features of the same examples."""
    return alignment(centred_gram(np.asarray(first_NE)[None]), centred_gram(np.asarray(second_NE)[None]))


# -- transferability -----------------------------------------------------------------------------------------


def log_evidence(features_NE: np.ndarray, classes_N: np.ndarray) -> float:
    """LogME: log evidence per example of a Bayesian linear model of the classes, mean over one-against-rest targets.

    You et al., arXiv 2102.11005: y ~ N(Fw, 1/β), w ~ N(0, 1/α), with the α and β that make the labels most probable.
    Higher is better; only values of the same labels can be compared.

    Args:
        features_NE: features of labeled examples.
        classes_N: class of each.

    Raises:
        ValueError: no two classes, or features and classes of different examples.
    """
    features_NE = np.asarray(features_NE, dtype=np.float64)
    names = np.unique(classes_N)
    if len(features_NE) != len(classes_N) or len(names) < 2:
        raise ValueError(f"needs a class for each of {len(features_NE)} examples, and two classes")
    left_NR, singular_R, _ = np.linalg.svd(features_NE, full_matrices=False)
    width = features_NE.shape[1]
    targets = [(classes_N == name).astype(np.float64) for name in names]
    found = [_evidence(left_NR, singular_R**2, target_N, width) for target_N in targets]
    return float(np.mean(found))


def _evidence(left_NR: np.ndarray, power_R: np.ndarray, target_N: np.ndarray, width: int) -> float:
    """Highest log evidence per example over α and β, by the fixed point of MacKay (1992)."""
    n = len(target_N)
    along_R = (left_NR.T @ target_N) ** 2
    outside = max(float(target_N @ target_N - along_R.sum()), 0.0)
    alpha = beta = 1.0
    for _ in range(ROUNDS):
        shrink_R = beta * power_R / (alpha + beta * power_R)
        weights = float((along_R * shrink_R**2 / np.maximum(power_R, 1e-300)).sum())
        rest = float((along_R * (1 - shrink_R) ** 2).sum()) + outside
        effective = float(shrink_R.sum())
        before = alpha / beta
        alpha = effective / max(weights, 1e-12)
        beta = (n - effective) / max(rest, 1e-12)
        if abs(alpha / beta - before) <= CLOSE * before:
            break
    shrink_R = beta * power_R / (alpha + beta * power_R)
    weights = float((along_R * shrink_R**2 / np.maximum(power_R, 1e-300)).sum())
    rest = float((along_R * (1 - shrink_R) ** 2).sum()) + outside
    spread = float(np.log(alpha + beta * power_R).sum()) + (width - len(power_R)) * np.log(alpha)
    total = width * np.log(alpha) + n * np.log(beta) - beta * rest - alpha * weights - spread
    return float((total - n * np.log(2 * np.pi)) / (2 * n))


@dataclass(frozen=True)
class RankCorrelation:
    """Kendall's rank correlation of an estimate with what came out.

    Attributes:
        tau: NaN with fewer than two sources, or where one side is constant.
        p: two-sided exact p-value.
        sources: how many were ranked.
        lowest_p: the smallest p-value so many sources can give at all.
    """

    tau: float
    p: float
    sources: int
    lowest_p: float


def rank_correlation(estimates: Sequence[float], outcomes: Sequence[float]) -> RankCorrelation:
    """Kendall's τ with its exact p-value (approximate with ties).

    Raises:
        ValueError: not as many outcomes as estimates.
    """
    from math import factorial

    from scipy import stats

    if len(estimates) != len(outcomes):
        raise ValueError(f"{len(estimates)} estimates for {len(outcomes)} outcomes")
    count = len(estimates)
    lowest = min(1.0, 2 / factorial(min(count, 20)))
    if count < 2 or len(set(estimates)) < 2 or len(set(outcomes)) < 2:
        return RankCorrelation(float("nan"), float("nan"), count, lowest)
    found = stats.kendalltau(estimates, outcomes)
    return RankCorrelation(float(found.statistic), float(found.pvalue), count, lowest)  # pyright: ignore[reportAttributeAccessIssue]
