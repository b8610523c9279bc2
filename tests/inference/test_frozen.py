"""Frozen encoders: crops at the right place and features of the right levels."""

from __future__ import annotations

import numpy as np
import pytest

from medseg_ssl.config import UserError
from medseg_ssl.data.store import NO_DATA
from medseg_ssl.inference.frozen import FrozenEncoder, network_crop
from tests.evaluations.fakes import MemoryArchive, PooledEncoder, card

BOX = (slice(4, 9), slice(3, 11), slice(5, 8))


def test_crop_hides_no_data_and_knows_the_body():
    volume = np.full((12, 12, 12), 30.0, np.float32)
    volume[:, :, 8:] = -1000.0
    valid = np.ones(volume.shape, bool)
    valid[:3] = False
    archive = MemoryArchive()
    archive.add_scan("s", volume, subject="p", valid=valid)
    crop = network_crop(archive, "s", card(), start=(0, 0, 0), size=(12, 12, 12))
    assert not crop.image_DHW[:3].any()
    assert np.array_equal(crop.valid_DHW, valid)
    assert np.array_equal(crop.body_DHW, valid & (volume > -500))
    assert archive.read("s", (0, 0, 0), (1, 1, 1)) == NO_DATA


def test_crop_at_the_cards_spacing_samples_the_right_place():
    ramp = np.broadcast_to(np.arange(40.0, dtype=np.float32), (20, 20, 40)) * 2 - 40
    archive = MemoryArchive()
    archive.add_scan("s", ramp.copy(), subject="p", spacing=(1.0, 1.0, 1.0))
    wide = card(spacing_mm=(1.0, 1.0, 2.0))
    crop = network_crop(archive, "s", wide, start=(4, 5, 6.5), size=(6, 6, 8))
    expected = (2 * (6.5 + 2 * np.arange(8)) - 40) / 50
    assert crop.image_DHW.shape == (6, 6, 8)
    assert np.allclose(crop.image_DHW[3, 3, 1:-1], expected[1:-1], atol=0.02)


def test_pooled_features_of_the_levels_asked_for():
    encoder = FrozenEncoder(PooledEncoder(), card(kind="encoder"))
    crops = np.random.default_rng(0).normal(size=(5, 1, 8, 8, 8)).astype(np.float32)
    deep = encoder.pooled(crops, spacing_mm=(1, 1, 1), levels=[-1], batch_size=2, how="mean")
    both = encoder.pooled(crops, spacing_mm=(1, 1, 1), levels=range(encoder.levels), batch_size=3, how="mean")
    assert deep.shape == (5, 2)
    assert both.shape == (5, 3)
    assert np.allclose(deep[:, 0], crops.mean(axis=(1, 2, 3, 4)), atol=1e-6)
    assert np.allclose(both[:, 1:], deep)
    joined = encoder.pooled(crops, spacing_mm=(1, 1, 1), levels=[-1], batch_size=2, how="mean_max")
    assert joined.shape == (5, 4)
    assert np.allclose(joined[:, :2], deep)
    halved = crops[:, 0].reshape(5, 4, 2, 4, 2, 4, 2).mean(axis=(2, 4, 6))
    assert np.allclose(joined[:, 2], halved.max(axis=(1, 2, 3)), atol=1e-6)
    with pytest.raises(UserError, match="2 channels"):
        FrozenEncoder(PooledEncoder(), card(kind="encoder", channels_in=2))
