"""Fuzzy c-means, with known answers."""

import numpy as np
import pytest

from medseg_ssl.baselines.fuzzy_cmeans import FuzzyCMeans, centres, memberships
from tests.baselines.bodies import truth, write


def test_memberships_are_inverse_distances():
    points, middles = np.array([[1.0, 0.0], [1.5, 0.0], [3.0, 0.0]]), np.array([[0.0, 0.0], [3.0, 0.0]])
    found = memberships(points, middles, fuzziness=2.0)
    np.testing.assert_allclose(found[:2], [[0.8, 0.2], [0.5, 0.5]])  # distances 1 and 2: 1 to 1/4
    np.testing.assert_allclose(found[2], [0.0, 1.0], atol=1e-9)
    # with m = 3 the distances themselves count
    np.testing.assert_allclose(memberships(points[:1], middles, fuzziness=3.0), [[2 / 3, 1 / 3]])
    np.testing.assert_allclose(memberships(points, middles, fuzziness=1.01)[0], [1.0, 0.0], atol=1e-9)


def test_centres_are_a_fixed_point_and_means_where_little_is_fuzzy():
    generator = np.random.default_rng(0)
    groups = [generator.normal(at, 0.3, (200, 2)) for at in ((0, 0), (6, 1), (2, 7))]
    points = np.concatenate(groups)
    start = np.array([[1.0, 1.0], [5.0, 0.0], [3.0, 5.0]])
    hard = centres(points, start, fuzziness=1.01, iterations=50)
    np.testing.assert_allclose(hard, [group.mean(axis=0) for group in groups], atol=1e-3)
    soft = centres(points, start, fuzziness=2.0, iterations=200)
    weights = memberships(points, soft, fuzziness=2.0) ** 2
    np.testing.assert_allclose((weights.T @ points) / weights.sum(axis=0)[:, None], soft, atol=1e-3)
    assert np.abs(soft - hard).max() > 1e-3  # far points pull a little


def test_centres_stay_without_points():
    np.testing.assert_array_equal(
        centres(np.zeros((0, 1)), np.array([[1.0], [2.0]]), fuzziness=2.0, iterations=5), [[1.0], [2.0]]
    )


@pytest.mark.parametrize("channels", [("MR",), ("MR", "CT")])
def test_organs_of_one_intensity_each_are_found_exactly(tmp_path, channels):
    archive = write(tmp_path, noise=0.0, channels=channels)
    baseline = FuzzyCMeans(FuzzyCMeans.Config(clusters=(3,)))
    baseline.fit(archive, ["c0"], seed=0)
    for case, label_DHW in baseline.predict_cases(archive, ["c1", "c2"]):
        np.testing.assert_array_equal(label_DHW, truth(archive, case))
