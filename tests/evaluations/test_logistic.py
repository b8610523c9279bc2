"""Logistic regression: known solutions of the bias, of a separable line, and no say for classes without samples."""

import numpy as np
import pytest

from medseg_ssl.evaluations._logistic import fit_logistic


def test_without_features_the_weighted_shares_come_out():
    class_N = np.array([0] * 6 + [1] * 3 + [3])
    weight_K = np.array([1.0, 2.0, 5.0, 4.0])
    scores_NK = fit_logistic(np.ones((10, 2)), class_N, weight_K, penalty=1e-3).scores(np.ones((1, 2)))
    share = np.exp(scores_NK[0])
    assert share / share.sum() == pytest.approx([6 / 16, 6 / 16, 0, 4 / 16], abs=1e-4)


def test_a_line_is_found_and_scale_does_not_matter():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(400, 5))
    class_N = (features @ np.array([1.0, -2, 0, 0, 0.5]) > 0.3).astype(int)
    fitted = fit_logistic(features, class_N, np.ones(2), penalty=1e-4)
    assert (fitted.scores(features).argmax(axis=1) == class_N).mean() > 0.98
    scaled = features * np.array([1000.0, 1, 1e-3, 1, 1]) + 7
    again = fit_logistic(scaled, class_N, np.ones(2), penalty=1e-4)
    assert np.allclose(again.scores(scaled), fitted.scores(features), atol=1e-2)
