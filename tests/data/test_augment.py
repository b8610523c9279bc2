from dataclasses import replace

import numpy as np
import pytest
import torch

from medseg_ssl.data.augment import SPATIAL, Spatial, draw_move, prepare_batch, rotation
from medseg_ssl.data.augment_intensity import INTENSITY, TRANSFORMS, Chance, Intensity, _band, _gaussian
from medseg_ssl.types import AUGMENTS, Batch, View, ViewSpec


def batch_of(image_BCDHW, valid_BDHW=None, *, seed=0, indices=None):
    count, _, *size = image_BCDHW.shape
    valid = torch.ones(count, *size, dtype=torch.bool) if valid_BDHW is None else valid_BDHW
    view = View(
        image_BCDHW=image_BCDHW * valid[:, None],
        valid_BDHW=valid,
        foreground_BDHW=valid,
        affine_B44=torch.eye(4, dtype=torch.float64).expand(count, 4, 4),
        spacing_mm_B3=torch.ones(count, 3),
        modality_B=["MR"] * count,
    )
    index = torch.arange(count) if indices is None else torch.tensor(indices)
    return Batch({"crop": [view]}, [""] * count, [""] * count, index, seed)


def plan_of(augment="strong", size=(12, 14, 10)):
    return {"crop": ViewSpec(1, size, augment=augment)}


def image_of(count=2, channels=1, size=(12, 14, 10)):
    return torch.randn(count, channels, *size, generator=torch.Generator().manual_seed(0))


def only(name, **chance):
    # the one transform, always
    return {"strong": Intensity(**{name: Chance(p=1, **chance)})}


def apply(name, image, valid=None, **chance):
    done = prepare_batch(batch_of(image, valid), plan_of(), recipes=only(name, **chance)).views["crop"][0]
    return done.image_BCDHW


def test_every_name_has_both_recipes():
    assert set(SPATIAL) == set(INTENSITY) == set(AUGMENTS)
    assert SPATIAL["none"] == Spatial()
    assert all(not recipe.mirror_axes for recipe in SPATIAL.values())
    assert set(TRANSFORMS) == set(Intensity.model_fields)


def test_none_changes_nothing():
    batch = batch_of(image_of())
    done = prepare_batch(batch, plan_of("none")).views["crop"][0]
    assert done is batch.views["crop"][0]
    assert done.clean_BCDHW is None


@pytest.mark.parametrize("recipe", sorted(set(AUGMENTS) - {"none"}))
def test_what_is_restored_is_the_clean_image_whatever_the_recipe(recipe):
    """A restoration whose target were the noisy, blurred image would learn to restore noise and blur."""
    image = image_of(32)
    before = image.clone()
    done = prepare_batch(batch_of(image), plan_of(recipe)).views["crop"][0]
    assert not torch.equal(done.image_BCDHW, before)
    assert torch.equal(done.target_BCDHW, before)


def test_a_labeled_view_keeps_no_second_image():
    plan = {name: replace(spec, labeled=True) for name, spec in plan_of("segmentation").items()}
    done = prepare_batch(batch_of(image_of(32)), plan).views["crop"][0]
    assert done.clean_BCDHW is None


def test_strong_keeps_the_clean_image_and_invalid_voxels_at_zero():
    image = image_of(8)
    valid = torch.ones(8, 12, 14, 10, dtype=torch.bool)
    valid[:, :, :4] = False
    before = (image * valid[:, None]).clone()
    batch = batch_of(image, valid)
    done = prepare_batch(batch, plan_of()).views["crop"][0]
    assert torch.equal(done.target_BCDHW, before)
    assert torch.equal(batch.views["crop"][0].image_BCDHW, before)
    assert not torch.equal(done.image_BCDHW, before)
    assert torch.all(done.image_BCDHW[~valid[:, None]] == 0)
    assert torch.isfinite(done.image_BCDHW).all()


def test_a_sample_is_augmented_alike_in_any_batch():
    image = image_of(6, channels=2)
    together = prepare_batch(batch_of(image.clone(), indices=list(range(10, 16))), plan_of()).views["crop"][0]
    alone = [
        prepare_batch(batch_of(image[i : i + 1].clone(), indices=[10 + i]), plan_of()).views["crop"][0]
        for i in range(6)
    ]
    assert torch.equal(together.image_BCDHW, torch.cat([view.image_BCDHW for view in alone]))
    other = prepare_batch(batch_of(image.clone(), indices=list(range(6))), plan_of()).views["crop"][0]
    assert not torch.equal(together.image_BCDHW, other.image_BCDHW)


@pytest.mark.parametrize("name", list(TRANSFORMS))
def test_transforms_survive_constant_and_empty_crops(name):
    for image in (torch.zeros(1, 1, 5, 6, 7), torch.full((1, 1, 5, 6, 7), 2.5)):
        assert torch.isfinite(apply(name, image.clone(), low=0.6, high=0.6)).all()
    nothing = torch.zeros(1, 5, 6, 7, dtype=torch.bool)
    assert not apply(name, torch.ones(1, 1, 5, 6, 7), nothing, low=0.6, high=0.6).any()


@pytest.mark.parametrize("name", ["gamma", "gamma_inverted"])
def test_gamma_keeps_mean_and_deviation_over_valid_voxels(name):
    image = image_of(1, size=(20, 20, 20)) * 2 + 0.5
    valid = torch.ones(1, 20, 20, 20, dtype=torch.bool)
    valid[:, :6] = False
    changed = apply(name, image.clone(), valid, low=0.6, high=0.6)[0, 0][valid[0]].numpy()
    image = image * valid[:, None]
    before, low, high = image[0, 0][valid[0]].numpy(), float(image.amin()), float(image.amax())
    assert changed.mean() == pytest.approx(before.mean(), abs=2e-3)
    assert changed.std() == pytest.approx(before.std(), rel=2e-3)
    expected = -((high - before) ** 0.6) if name == "gamma_inverted" else (before - low) ** 0.6
    assert np.corrcoef(expected, changed)[0, 1] > 0.9999


def test_contrast_keeps_range_and_mean():
    image = image_of(1, size=(16, 16, 16))
    wide = apply("contrast", image.clone(), low=1.4, high=1.4)
    assert wide.amin() == image.amin()
    assert wide.amax() == image.amax()
    flat = apply("contrast", image.clone(), low=0.5, high=0.5)
    torch.testing.assert_close(flat, image * 0.5 + image.mean() * 0.5)


def test_noise_brightness_and_inversion():
    image = image_of(1, size=(24, 24, 24))
    assert float((apply("noise", image.clone(), low=0.3, high=0.3) - image).std()) == pytest.approx(
        0.3, rel=0.03
    )
    torch.testing.assert_close(apply("brightness", image.clone(), low=1.2, high=1.2), image * 1.2)
    inverted = apply("inversion", image.clone(), low=1, high=1)
    torch.testing.assert_close(inverted, image.amin() + image.amax() - image)


def test_dropped_channels_are_zero_and_one_always_stays():
    image = image_of(40, channels=3)
    left = (
        apply("channel_dropout", image.clone(), low=0, high=0, channel_p=0.5).flatten(2).abs().amax(dim=2) > 0
    )
    assert left.any(dim=1).all()
    assert set(left.sum(dim=1).tolist()) == {1, 2, 3}
    kept = apply("channel_dropout", image.clone(), low=0, high=0)
    assert (kept.flatten(2).abs().amax(dim=2) > 0).sum() == 40
    single = image[:, :1].clone()
    assert torch.equal(apply("channel_dropout", single.clone(), low=0, high=0), single)


def test_blur_is_a_gaussian_with_replicated_edges():
    image = torch.zeros(1, 1, 15, 15, 15)
    image[0, 0, 7, 7, 7] = 1
    blurred = apply("blur", image, low=0.9, high=0.9)[0, 0]
    assert float(blurred.sum()) == pytest.approx(1, abs=1e-5)
    assert float(blurred[7, 7, 8] / blurred[7, 7, 7]) == pytest.approx(np.exp(-0.5 / 0.81), rel=1e-4)
    torch.testing.assert_close(blurred, blurred.permute(2, 0, 1))
    # the loop for the CPU is the product of the matrices a GPU uses
    noise = image_of(1, size=(9, 4, 13))
    band = [torch.from_numpy(_band(_gaussian(0.9), n)) for n in noise.shape[2:]]
    expected = torch.einsum("ad,be,cf,def->abc", *band, noise[0, 0])
    torch.testing.assert_close(apply("blur", noise.clone(), low=0.9, high=0.9)[0, 0], expected)
    flat = torch.full((1, 1, 6, 6, 6), 3.0)
    torch.testing.assert_close(apply("blur", flat.clone(), low=1.5, high=1.5), flat)


def test_low_resolution_is_blocky_and_keeps_the_shape():
    image = image_of(1, size=(20, 17, 13))
    coarse = apply("low_resolution", image.clone(), low=0.5, high=0.5)
    assert coarse.shape == image.shape
    assert coarse.diff(dim=-1).abs().mean() < image.diff(dim=-1).abs().mean()


def test_probabilities_hold():
    recipes = {"strong": Intensity(brightness=Chance(p=0.3, low=2.0, high=2.0))}
    done = prepare_batch(batch_of(torch.ones(2000, 1, 1, 1, 1)), plan_of(), recipes=recipes).views["crop"][0]
    assert float((done.image_BCDHW == 2).float().mean()) == pytest.approx(0.3, abs=0.03)


# -- spatial ---------------------------------------------------------------------------------------------------------


def test_moves_follow_their_probabilities():
    recipe = Spatial(rotation_p=0.2, rotation_deg=30, scale_p=0.2, scale=(0.7, 1.4), mirror_axes=(0, 2))
    moves = [
        draw_move(recipe, np.random.default_rng(i), spacing_mm=(1, 1, 1), size=(8, 8, 8)) for i in range(2000)
    ]
    still = np.mean([move.linear_33 is None for move in moves])
    assert still == pytest.approx(0.64, abs=0.04)
    factors = [np.cbrt(np.linalg.det(m.linear_33)) for m in moves if m.linear_33 is not None]
    assert min(factors) >= 0.7 - 1e-9
    assert max(factors) <= 1.4 + 1e-9
    flips = np.array([move.flip for move in moves])
    assert flips.mean(axis=0).tolist() == pytest.approx([0.5, 0, 0.5], abs=0.04)


def test_a_rotation_is_rigid_and_bounded():
    turned = rotation(np.deg2rad((10, 20, 30)))
    np.testing.assert_allclose(turned @ turned.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(turned) == pytest.approx(1)
    np.testing.assert_allclose(rotation(np.deg2rad((90, 0, 0))) @ (0, 1, 0), (0, 0, 1), atol=1e-12)


def test_thick_slices_are_only_turned_in_their_plane():
    recipe = Spatial(rotation_p=1, rotation_deg=30)
    for seed in range(20):
        turn = draw_move(
            recipe, np.random.default_rng(seed), spacing_mm=(5.0, 0.8, 0.8), size=(8, 8, 8)
        ).linear_33
        np.testing.assert_allclose(turn[0], (1, 0, 0), atol=1e-12)
        np.testing.assert_allclose(turn[:, 0], (1, 0, 0), atol=1e-12)
        assert abs(turn[1, 2]) > 0


@pytest.mark.parametrize("name", sorted(set(Intensity.model_fields) - {"channel_dropout"}))
def test_a_channel_is_augmented_by_what_it_shows_itself(name):
    """PET beyond the CT's field of view: what the CT lacks there must change nothing of it, nor be taken away."""
    image = image_of(count=1, channels=2) - 0.5
    inside = torch.ones(1, 12, 14, 10, dtype=torch.bool)
    inside[..., 7:] = False
    chance = {"low": 0.6, "high": 0.9}
    both = batch_of(image)
    view = both.views["crop"][0]
    view.image_BCDHW[:, 0] *= inside
    view.valid_BDHW, view.foreground_BDHW = inside, inside
    alone = batch_of(image)
    done, expected = (
        prepare_batch(given, plan_of(), recipes=only(name, **chance)).views["crop"][0].image_BCDHW
        for given in (both, alone)
    )
    torch.testing.assert_close(done[:, 1], expected[:, 1])
    assert not done[:, 0][~inside].any(), "no data stays 0"
    assert done[:, 0][inside].std() > 0.05
