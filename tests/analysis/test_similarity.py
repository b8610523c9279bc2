"""CKA and LogME: invariances, unbiasedness, and evidence against a direct computation."""

import numpy as np
import pytest
from scipy import optimize, stats

from medseg_ssl.analysis.similarity import alignment, centred_gram, linear_cka, log_evidence, rank_correlation


def orthogonal(generator, size):
    return np.linalg.qr(generator.standard_normal((size, size)))[0]


def test_alignment_of_rotated_scaled_and_shifted_features_is_one():
    generator = np.random.default_rng(0)
    features_NE = generator.standard_normal((30, 7))
    assert linear_cka(features_NE, features_NE @ orthogonal(generator, 7)) == pytest.approx(1)
    assert linear_cka(features_NE, -3 * features_NE + 1000) == pytest.approx(1)
    stretched = features_NE * np.array([10, 1, 1, 1, 1, 1, 1])
    assert linear_cka(features_NE, stretched) < 0.8, "an anisotropic stretch is another representation"


def test_unrelated_features_align_to_zero_where_the_biased_estimate_does_not():
    generator = np.random.default_rng(1)
    wide = [generator.standard_normal((2, 20, 200)) for _ in range(200)]
    assert abs(np.mean([linear_cka(a, b) for a, b in wide])) < 0.01
    centred = [pair - pair.mean(axis=1, keepdims=True) for pair in wide]
    biased = [
        np.sum((a @ a.T) * (b @ b.T)) / np.linalg.norm(a @ a.T) / np.linalg.norm(b @ b.T) for a, b in centred
    ]
    assert np.mean(biased) > 0.5


def test_unbiased_product_equals_the_formula_of_song():
    generator = np.random.default_rng(2)
    x, y = generator.standard_normal((6, 3)), generator.standard_normal((6, 5))
    k, m = x @ x.T, y @ y.T
    np.fill_diagonal(k, 0)
    np.fill_diagonal(m, 0)
    n, one = 6, np.ones(6)
    formula = np.trace(k @ m) + k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ k @ m @ one)
    product = float((centred_gram(x[None]) * centred_gram(y[None])).sum())
    assert product == pytest.approx(formula)


def test_minibatches_are_averaged_and_checked():
    generator = np.random.default_rng(3)
    x, y = generator.standard_normal((2, 8, 4)), generator.standard_normal((2, 8, 6))
    a, b = centred_gram(x), centred_gram(y)
    parts = [(a[i] * b[i]).sum() for i in range(2)]
    norms = [np.sqrt(np.square(side).sum()) for side in (a, b)]
    assert alignment(a, b) == pytest.approx(sum(parts) / norms[0] / norms[1])
    assert np.isnan(alignment(a, centred_gram(np.ones((2, 8, 3)))))
    with pytest.raises(ValueError, match="4 or more examples"):
        centred_gram(np.ones((1, 3, 2)))
    with pytest.raises(ValueError, match="same examples"):
        alignment(a, b[:1])


@pytest.mark.parametrize("width", [3, 40])
def test_evidence_equals_the_best_gaussian_evidence(width):
    generator = np.random.default_rng(4)
    features_NE = generator.standard_normal((25, width))
    classes_N = (features_NE[:, 0] + 0.5 * generator.standard_normal(25) > 0).astype(int)

    def negative(log_parameters, target):
        alpha, beta = np.exp(log_parameters)
        covariance = np.eye(25) / beta + features_NE @ features_NE.T / alpha
        return -stats.multivariate_normal(np.zeros(25), covariance).logpdf(target) / 25

    best = [
        -optimize.minimize(
            negative, np.zeros(2), args=((classes_N == k).astype(float),), method="Nelder-Mead"
        ).fun
        for k in (0, 1)
    ]
    assert log_evidence(features_NE, classes_N) == pytest.approx(np.mean(best), abs=1e-3)


def test_evidence_prefers_features_that_tell_the_classes():
    generator = np.random.default_rng(5)
    classes_N = np.arange(60) % 3
    noise_NE = generator.standard_normal((60, 8))
    telling_NE = noise_NE + 3 * np.eye(8)[classes_N]
    assert log_evidence(telling_NE, classes_N) > log_evidence(noise_NE, classes_N) + 0.2
    with pytest.raises(ValueError, match="two classes"):
        log_evidence(noise_NE, np.zeros(60))


def test_rank_correlation_says_what_so_few_can_show():
    found = rank_correlation([1.0, 2.0, 3.0], [0.1, 0.2, 0.3])
    assert (found.tau, found.sources) == (1.0, 3)
    assert found.p == pytest.approx(found.lowest_p) == pytest.approx(1 / 3)
    five = rank_correlation([1, 2, 3, 4, 5], [5, 4, 3, 2, 1])
    assert (five.tau, five.p) == pytest.approx((-1.0, five.lowest_p))
    assert five.lowest_p == pytest.approx(2 / 120)
    assert np.isnan(rank_correlation([1.0], [2.0]).tau)
    assert np.isnan(rank_correlation([1.0, 1.0], [2.0, 3.0]).p)
