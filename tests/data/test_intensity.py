import numpy as np
import pytest
from pydantic import ValidationError
from scipy import ndimage

from medseg_ssl.data import intensity, nifti
from medseg_ssl.data.intensity import DEFAULT_POLICIES, Policy, linear, no_data_region, policies, statistics
from medseg_ssl.data.manifest import Statistics


def facts(**values):
    base = dict(minimum=0, maximum=10, mean=5, std=2, p005=0, median=5, p995=10)
    return Statistics(**{**base, "foreground_threshold": 0, "foreground_fraction": 0.5, **values})


def head(seed=0, shape=(40, 44, 48), offset=0.0):
    """An MR-like ball of two tissues in Rician noise."""
    rng = np.random.default_rng(seed)
    d, h, w = np.indices(shape)
    radius = np.sqrt(sum((i - n / 2) ** 2 for i, n in zip((d, h, w), shape, strict=True)))
    clean = np.where(radius < 17, 600.0, 0.0)
    clean[radius < 10] = 350.0
    noise = rng.normal(scale=12, size=(2, *shape))
    volume = np.hypot(clean + noise[0], noise[1]) + offset
    return volume.astype(np.float32), radius < 17


def test_ct_window_is_centred_and_clipped():
    line = linear(DEFAULT_POLICIES["CT"], facts())
    out = line.apply(np.array([-3000.0, -1000.0, 0.0, 1000.0, 3000.0]))
    np.testing.assert_allclose(out, [-3, -3, 0, 3, 3], atol=1e-6)
    assert out.dtype == np.float32
    np.testing.assert_allclose(line.invert(out), [-1000, -1000, 0, 1000, 1000], atol=1e-3)
    assert linear(Policy(kind="window", hu_range=(-160, 240)), facts()).apply(40.0) == 0.0


def test_pet_window_and_its_fallback_for_raw_counts():
    policy = DEFAULT_POLICIES["PT"]
    line = linear(policy, facts(), unit="SUV")
    assert (line.low, line.high) == (0.0, 20.0)
    assert -1 < line.apply(0.0) < line.apply(2.0) == 0.0 < line.apply(99.0) < 6
    raw = linear(policy, facts(p005=0, median=4000, p995=20000), unit="raw")
    assert raw.shift == 4000


def test_a_ct_that_is_not_in_hu_has_no_window():
    """Stored 0 to 4095 with soft tissue at 1064: a window of HU would make all of it one constant."""
    volume, inside = head()
    stored = (volume / 10 + np.where(inside, 1024, 24)).astype(np.float32)
    stats = statistics(stored, None, modality="CT", unit="raw")
    line = linear(DEFAULT_POLICIES["CT"], stats, unit="raw")
    assert line == linear(DEFAULT_POLICIES["MR"], stats)
    assert line.apply(stored).std() > 0.2
    body = intensity.foreground(stored, None, "CT", unit="raw")
    assert (body == inside).all()
    assert linear(DEFAULT_POLICIES["CT"], stats, unit="HU").high == 1000


def test_robust_zscore_ignores_outliers():
    rng = np.random.default_rng(0)
    values = rng.normal(700, 90, size=(30, 30, 30)).astype(np.float32)
    values[0, 0, :20] = 1e6
    stats = statistics(values, None, modality="MR", threshold=0.0)
    line = linear(DEFAULT_POLICIES["MR"], stats)
    out = line.apply(values)
    assert out[1:].mean() == pytest.approx(0, abs=0.03)
    assert out[1:].std() == pytest.approx(4 / 5.15, abs=0.05)
    assert out.max() == pytest.approx(5.0)
    assert out.min() >= -3.001


@pytest.mark.parametrize("factor", [1e-3, 1.0, 1e6])
def test_mr_normalisation_does_not_depend_on_the_scale(factor):
    volume, body = head()
    reference = linear(DEFAULT_POLICIES["MR"], statistics(volume, None, modality="MR")).apply(volume)
    scaled = volume * np.float32(factor)
    out = linear(DEFAULT_POLICIES["MR"], statistics(scaled, None, modality="MR")).apply(scaled)
    np.testing.assert_allclose(out, reference, atol=1e-3)
    assert abs(out[body].mean()) < 1.0


def test_flat_foreground_stays_finite():
    stats = statistics(np.full((4, 4, 4), 7.0, np.float32), None, modality="MR")
    assert np.isfinite(linear(DEFAULT_POLICIES["MR"], stats).apply(np.array([0.0, 7.0, 14.0]))).all()


def test_mr_foreground_is_the_body():
    volume, body = head()
    found = intensity.foreground(volume, None, "MR")
    assert (found & body).sum() / (found | body).sum() > 0.98
    valid = np.zeros_like(body)
    valid[:20] = True
    assert not intensity.foreground(volume, valid, "MR")[20:].any()


def test_thresholds():
    volume = np.array([[[-1000.0, -600, -400, 40]]], dtype=np.float32)
    np.testing.assert_array_equal(intensity.foreground(volume, None, "CT")[0, 0], [0, 0, 1, 1])
    uptake = np.array([[[0.0, 0.05, 0.3, 8]]], dtype=np.float32)
    np.testing.assert_array_equal(intensity.foreground(uptake, None, "PT", unit="SUV")[0, 0], [0, 0, 1, 1])
    np.testing.assert_array_equal(intensity.foreground(uptake * 1e4, None, "PT")[0, 0], [0, 0, 1, 1])
    assert intensity.foreground(uptake, None, "PT", threshold=1.0).sum() == 1
    assert intensity.foreground_threshold(np.zeros((2, 2, 2)), None, modality="MR") == 0.0


def test_otsu_known_answer():
    values = np.concatenate([np.full(700, 1.0), np.full(300, 9.0)])
    assert 1.0 < intensity.otsu(values) < 9.0
    assert intensity.otsu(values) == pytest.approx(5.0, abs=0.1)
    assert intensity.otsu(np.full(9, 50.0)) == 50.0


def test_statistics_leave_no_data_out():
    volume, _ = head()
    valid = np.ones(volume.shape, dtype=bool)
    valid[:, :, :10] = False
    poisoned = np.where(valid, volume, 1e9).astype(np.float32)
    assert statistics(poisoned, valid, modality="MR") == statistics(
        np.where(valid, volume, -5).astype(np.float32), valid, modality="MR"
    )
    with pytest.raises(ValueError, match="no valid voxel"):
        statistics(volume, np.zeros_like(valid), modality="MR")


def test_statistics_without_foreground():
    stats = statistics(
        np.full((4, 4, 4), -1000.0, np.float32) + np.eye(4, dtype=np.float32), None, modality="CT"
    )
    assert stats.foreground_fraction == 0
    assert stats.minimum == -1000
    assert stats.foreground_threshold == -500


def test_foreground_box():
    body = np.zeros((5, 6, 7), dtype=bool)
    assert intensity.foreground_box(body) == ((0, 0, 0), (5, 6, 7))
    body[1:3, 2, 3:6] = True
    assert intensity.foreground_box(body) == ((1, 2, 3), (3, 3, 6))


def test_no_data_outside_the_field_of_view():
    volume, _ = head(offset=1.0)
    volume[:, :, :5] = 0
    volume[20, 20, 20] = 0
    found = no_data_region(volume, "MR")
    assert found is not None
    np.testing.assert_array_equal(found, np.broadcast_to(np.arange(48) < 5, volume.shape))
    assert no_data_region(volume, "PT", unit="SUV") is None


def test_few_dark_voxels_stay_data():
    volume, _ = head(offset=1.0)
    volume[0, 0, :] = 0
    volume[ndimage.binary_erosion(np.ones_like(volume), iterations=12)] = 0
    assert no_data_region(volume, "MR") is None
    assert no_data_region(np.zeros((4, 4, 4), np.float32), "MR") is None


def test_ct_padding_is_no_data_and_air_is_not():
    d, h, w = np.indices((10, 40, 40))
    circle = (h - 20) ** 2 + (w - 20) ** 2 < 380
    air = np.where(circle, -1000.0 + d, -1024.0).astype(np.float32)
    assert no_data_region(air, "CT", unit="HU") is None
    padded = np.where(circle, air, -3024).astype(np.float32)
    found = no_data_region(padded, "CT", unit="HU")
    assert found is not None
    np.testing.assert_array_equal(found, ~circle)


@pytest.mark.parametrize(
    ("block", "match"),
    [
        ({"kind": "window"}, "needs hu_range"),
        ({"kind": "window", "hu_range": [5, -5]}, "must rise"),
        ({"kind": "suv_window", "hu_range": [0, 5]}, "has no hu_range"),
        ({"kind": "robust_zscore", "suv_range": [0, 5]}, "has no suv_range"),
        ({"kind": "robust_zscore", "clip": [5, -3]}, "clip must rise"),
        ({"kind": "zscore"}, "kind"),
    ],
)
def test_wrong_policies(block, match):
    with pytest.raises(ValidationError, match=match):
        Policy.model_validate(block)


def test_policies_round_trip_and_merge():
    for policy in DEFAULT_POLICIES.values():
        assert Policy.model_validate(policy.model_dump(mode="json")) == policy
    narrow = Policy(kind="window", hu_range=(-160, 240))
    assert policies({"CT": narrow})["CT"] == narrow
    assert policies()["MR"] == DEFAULT_POLICIES["MR"]
    with pytest.raises(ValueError, match="no modality named 'PET'; known: CT, MR, PT"):
        policies({"PET": narrow})


@pytest.mark.realdata
def test_real_hippocampus_crops_hold_no_empty_region(real_data):
    files = sorted((real_data / "msd_hippocampus" / "imagesTr").glob("*.nii.gz"))[::5]
    for file in files:
        volume = nifti.read_nifti(file).array
        assert no_data_region(volume, "MR") is None, file.name
        stats = statistics(volume, None, modality="MR")
        assert stats.foreground_fraction > 0.6, file.name
        out = linear(DEFAULT_POLICIES["MR"], stats).apply(volume)
        assert abs(out.mean()) < 0.7, file.name
        assert 0.6 < out.std() < 1.5, file.name


@pytest.mark.realdata
def test_real_mr_field_of_view(real_data):
    shares = []
    for file in sorted((real_data / "sts_ct_pet_mr" / "common_grid").glob("*MR_T1.nii.gz")):
        volume = nifti.read_nifti(file).array
        found = no_data_region(volume, "MR")
        shares.append(0.0 if found is None else float(found.mean()))
        assert abs(shares[-1] - float((volume == 0).mean())) < 0.02, file.name
    assert max(shares) > 0.7
    assert sum(share > 0.01 for share in shares) > 25


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("suffix", "modality", "unit"), [("CT", "CT", "HU"), ("PET", "PT", "SUV"), ("MR_T1", "MR", "raw")]
)
def test_real_normalised_ranges(real_data, suffix, modality, unit):
    for file in sorted((real_data / "sts_ct_pet_mr" / "common_grid").glob(f"*_{suffix}.nii.gz"))[::5]:
        volume = nifti.read_nifti(file).array
        empty = no_data_region(volume, modality, unit=unit)
        valid = None if empty is None else ~empty
        stats = statistics(volume, valid, modality=modality, unit=unit)
        out = linear(DEFAULT_POLICIES[modality], stats, unit=unit).apply(volume)
        body = intensity.foreground(volume, valid, modality, unit=unit)
        assert out.min() >= -3.01
        assert out.max() <= 5.5
        assert abs(out[body].mean()) < 1.0, file.name
        assert 0.05 < body.mean() < 0.99, file.name
