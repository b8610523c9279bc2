"""Health: known ranks and cosines, and an alarm-worthy number for a collapsed encoder."""

import numpy as np
import pytest
from torch import nn

from medseg_ssl.config import ConfigError, UserError, find
from medseg_ssl.evaluations.base import Evaluation
from medseg_ssl.evaluations.health import Health, effective_rank, mean_cosine
from medseg_ssl.inference.frozen import FrozenEncoder
from medseg_ssl.inference.predictor import Predictor
from medseg_ssl.train.health import alarms
from tests.evaluations.fakes import MemoryArchive, PooledEncoder, Threshold, card


def test_rank_of_known_spectra():
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(64, 64)))[0]
    basis -= basis.mean(axis=0)
    left = np.linalg.qr(basis[:, :5])[0]
    right = np.linalg.qr(rng.normal(size=(16, 16)))[0][:5]
    assert effective_rank(left @ right) == pytest.approx(5, abs=1e-6)
    assert effective_rank(left[:, :1] @ right[:1]) == pytest.approx(1, abs=1e-6)
    assert effective_rank(np.ones((10, 4)) * 3.3) == 1.0
    spectrum = np.array([8.0, 1, 1, 1, 1])
    share = spectrum / spectrum.sum()
    assert effective_rank((left * spectrum) @ right) == pytest.approx(np.exp(-(share * np.log(share)).sum()))


def test_cosine_of_known_vectors():
    assert mean_cosine(np.array([[1.0, 0], [0, 1.0]])) == pytest.approx(0)
    assert mean_cosine(np.array([[1.0, 0], [2.0, 0], [-3.0, 0]])) == pytest.approx(-1 / 3)


def archive_of_three():
    archive = MemoryArchive(classes=())
    rng = np.random.default_rng(0)
    for i in range(3):
        for modality, unit in (("CT", "HU"), ("MR", "raw")):
            volume = rng.normal(40 + 10 * i, 30, (12, 12, 12)).astype(np.float32)
            archive.add_scan(f"{modality}{i}", np.abs(volume), subject=f"p{i}", modality=modality, unit=unit)
    archive.set_split(train=("p0", "p1"), test=("p2",))
    return archive


class Collapsed(nn.Module):
    channels, strides = (4,), ((8, 8, 8),)

    def forward(self, image_BCDHW, spacing_mm_B3=None):
        return [image_BCDHW.new_ones(len(image_BCDHW), 4, 1, 1, 1)]


def scores(encoder, **options):
    evaluation = Health(Health.Config(**{"crops": 12, "crop_size": (8, 8, 8), **options}))
    return {
        s.name: s.value
        for s in evaluation.run(FrozenEncoder(encoder, card(kind="encoder")), archive_of_three())
    }


def test_collapse_shows():
    found = scores(Collapsed())
    assert found["effective_rank/all"] == 1.0
    assert found["mean_cosine/CT"] == pytest.approx(1.0)
    assert found["dead_share/MR"] == 1.0


def test_living_features_per_modality_and_together():
    found = scores(PooledEncoder())
    assert 1 < found["effective_rank/all"] <= 2
    assert found["dimensions/CT"] == 2
    assert found["dead_share/all"] == 0.0
    assert found == scores(PooledEncoder())
    assert found != scores(PooledEncoder(), seed=1)


def test_crops_that_coincide_count_once():
    assert {k: v for k, v in scores(PooledEncoder()).items() if "distinct" in k} == {
        "distinct_crops/CT": 12,
        "distinct_crops/MR": 12,
        "distinct_crops/all": 24,
    }
    whole = scores(PooledEncoder(), crop_size=(12, 12, 12))
    assert (whole["distinct_crops/CT"], whole["distinct_crops/all"]) == (3, 6)


def test_two_scans_as_large_as_a_crop_are_no_collapse():
    whole = scores(PooledEncoder(), crop_size=(12, 12, 12), subset="train")
    assert whole["effective_rank/CT"] == pytest.approx(1.0), "two points lie on a line, in any encoder"
    assert not list(alarms({f"eval/health/{name}": value for name, value in whole.items()}))
    collapsed = scores(Collapsed(), crop_size=(12, 12, 12), subset="train")
    told = list(alarms({f"eval/health/{name}": value for name, value in collapsed.items()}))
    assert len(told) == 3
    assert all("std_relative is 0" in text for text in told)


def test_refusals():
    with pytest.raises(UserError, match="no scan in subset 'development'"):
        scores(PooledEncoder(), subset="development")
    with pytest.raises(ConfigError, match="evaluate"):
        list(Health(Health.Config()).run(Predictor(Threshold(), card()), archive_of_three()))
    assert find("medseg_ssl.evaluations", "health", Evaluation) is Health
