"""Voxel kNN and linear probe: features that name the class give Dice 1, features that say nothing give chance."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from medseg_ssl.config import ConfigError, UserError
from medseg_ssl.evaluations._voxels import Voxels, _case_rows
from medseg_ssl.evaluations._windows import sample, windows_of
from medseg_ssl.evaluations.knn import KNN
from medseg_ssl.evaluations.linear import Linear
from medseg_ssl.inference.frozen import FrozenEncoder
from medseg_ssl.inference.predictor import Predictor
from medseg_ssl.types import UNKNOWN_LABEL
from tests.evaluations.fakes import MemoryArchive, Threshold, affine, card

SHAPE, SPACING = (10, 13, 16), (3.0, 1.5, 1.0)
VALUES = (-100.0, 0.0, 100.0)
SMALL = {"cases": 2, "crop_size": (8, 8, 8), "windows": None, "taught_voxels": 400, "scored_voxels": 400}
PROBES = pytest.mark.parametrize("probe", [KNN, Linear])


class Named(nn.Module):
    """One-hot of three ranges of intensity: what the label says, at every voxel."""

    channels, strides = (3,), ((1, 1, 1),)

    def forward(self, image_BCDHW, spacing_mm_B3=None):
        return [torch.cat([image_BCDHW < -1, image_BCDHW.abs() <= 1, image_BCDHW > 1], dim=1).float()]


class Noise(nn.Module):
    """Random numbers that have nothing to do with the image."""

    channels, strides = (6,), ((1, 1, 1),)

    def forward(self, image_BCDHW, spacing_mm_B3=None):
        b, _, d, h, w = image_BCDHW.shape
        generator = torch.Generator().manual_seed(int(image_BCDHW.abs().sum() * 100) % 2**31)
        return [torch.randn(b, 6, d, h, w, generator=generator)]


class Constant(nn.Module):
    channels, strides = (2,), ((2, 2, 2),)

    def forward(self, image_BCDHW, spacing_mm_B3=None):
        b, _, d, h, w = image_BCDHW.shape
        return [image_BCDHW.new_ones(b, 2, d // 2, h // 2, w // 2)]


def labeled_archive(*, cases=6, known=(), unknown_slab=False, channels=1):
    """Three classes that intensity names; training p0 to p3, development p4, test p5."""
    archive = MemoryArchive(classes=("background", "middle", "bright"))
    for i in range(cases):
        rng = np.random.default_rng(i)
        label = np.zeros(SHAPE, np.uint8)
        d, h, w = rng.integers(1, 3, 3)
        label[d : d + 5, h : h + 6, w : w + 6] = 1
        label[d + 2 : d + 6, h + 3 : h + 9, w + 7 : w + 12] = 2
        volume = np.choose(label, VALUES).astype(np.float32) + rng.uniform(-20, 20, SHAPE).astype(np.float32)
        if unknown_slab:
            label[-2:] = UNKNOWN_LABEL
        keys = [f"s{i}c{c}" for c in range(channels)]
        for key in keys:
            archive.add_scan(key, volume, subject=f"p{i}", spacing=SPACING)
        archive.add_case(f"case{i}", keys, label, known=known if i % 2 else ())
    archive.set_split(train=("p0", "p1", "p2", "p3"), development=("p4",), test=("p5",))
    return archive


def scores(probe, encoder, archive, **options):
    evaluation = probe(probe.Config(**{**SMALL, **options}))
    return {s.name: s for s in evaluation.run(FrozenEncoder(encoder, card(kind="encoder")), archive)}


def values(found):
    return {name: score.value for name, score in found.items()}


@PROBES
def test_features_that_name_the_class_give_dice_one(probe):
    found = scores(probe, Named(), labeled_archive())
    assert found["dice"].value == pytest.approx(1.0)
    assert found["dice/middle"].value == found["dice/bright"].value == 1.0
    assert (found["cases"].value, found["scored"].value) == (2, 1)
    assert {row["case"] for row in found["dice"].per_case} == {"case4"}, "development by default"
    assert scores(probe, Named(), labeled_archive(), subset="test")["dice"].per_case[0]["case"] == "case5"
    held_back = scores(probe, Named(), labeled_archive(), subset="train")["dice"].per_case
    assert len({row["case"] for row in held_back}) == 2, "of training cases those that do not teach"


@PROBES
def test_features_that_say_nothing_give_chance(probe):
    archive = labeled_archive()
    noise = scores(probe, Noise(), archive, prior=0.0, draws=2)
    share = np.mean([(label == k).mean() for label, _ in archive.labels.values() for k in (1, 2)])
    # guessing each of three classes a third of the time has Dice 2·(s/3) / (s + 1/3) for a share s of the voxels
    assert noise["dice"].value == pytest.approx(2 * share / 3 / (share + 1 / 3), abs=0.06)
    assert values(scores(probe, Constant(), archive))["dice"] < 0.1, "one class everywhere"
    assert noise["intensity/dice"].value > 0.9, "here the intensities themselves name the class"


@PROBES
def test_the_same_twice_and_another_seed_takes_other_voxels(probe):
    archive = labeled_archive()
    one = values(scores(probe, Noise(), archive, prior=0.0))
    assert one == values(scores(probe, Noise(), archive, prior=0.0))
    assert one != values(scores(probe, Noise(), archive, prior=0.0, seed=1))


def test_teaching_cases_are_nested_and_of_other_subjects():
    archive = labeled_archive()
    chosen = []
    for cases in (1, 2, 3, 9):
        probe = KNN(KNN.Config(cases=cases, draws=2))
        teaching, scored = probe._cases(archive)
        assert scored == ["case4"]
        chosen.append(teaching)
    for small, large in pairwise(chosen):
        assert all(a == b[: len(a)] for a, b in zip(small, large, strict=True))
    assert len(chosen[-1][0]) == 4, "all where there are fewer"


@PROBES
def test_what_nobody_stated_enters_nothing(probe):
    found = scores(probe, Named(), labeled_archive(unknown_slab=True), scored_voxels=10_000)
    assert found["dice"].value == 1.0
    partial = labeled_archive(known=(True, True, False))
    archive_label = partial.labels["case1"][0]
    archive_label[archive_label == 2] = 0  # hidden among the background
    found = scores(probe, Named(), partial, cases=4, scored_voxels=10_000)
    assert found["dice/bright"].value == 1.0, "its voxels taught nobody that bright is background"


def test_a_class_counts_by_its_share_among_the_cases_that_state_it():
    """Four cases of the same label, of which three state one class alone: the shares are those of the label."""
    archive = labeled_archive()
    label = archive.labels["case0"][0]
    for i, known in enumerate(((), (True, True, False), (True, True, False), (True, False, True))):
        archive.labels[f"case{i}"][0][:] = np.where(
            np.isin(label, np.flatnonzero(known or (1, 1, 1))), label, 0
        )
        archive.cases[f"case{i}"] = archive.cases[f"case{i}"].model_copy(update={"known_classes": known})
    probe, model = KNN(KNN.Config(**SMALL, baseline=False)), FrozenEncoder(Named(), card(kind="encoder"))
    parts = [probe._voxels(model, archive, f"case{i}", 400, teaches=True) for i in range(4)]
    taught = Voxels.join(parts)
    mass_K = taught.class_weights(1.0) * np.bincount(taught.label_N)
    assert mass_K == pytest.approx(np.bincount(label.ravel()) / label.size)
    whole = parts[0]
    expected_K = whole.count_K / whole.count_K.sum() / np.bincount(whole.label_N)
    assert np.array_equal(whole.class_weights(1.0), expected_K), "digit for digit where every class is stated"


@PROBES
def test_nobody_teaches_without_background(probe):
    archive = labeled_archive(known=(True, True, False))
    archive.set_split(train=("p1", "p3"), development=("p4",))
    with pytest.raises(
        UserError, match=r"none of the 2 teaching case\(s\) states every class, .* take more cases"
    ):
        scores(probe, Named(), archive)
    archive.set_split(train=("p1", "p2", "p3"), development=("p4",))
    assert scores(probe, Named(), archive, cases=3)["dice"].value > 0.9


def test_channels_are_joined_and_must_share_a_grid():
    archive = labeled_archive(channels=2)
    assert scores(KNN, Named(), archive)["dice"].value == pytest.approx(1.0)
    other = labeled_archive(channels=2)
    other.scans["s0c1"] = other.scans["s0c1"].model_copy(
        update={"affine_44": tuple(map(tuple, affine(SPACING, origin=(9.0, 0, 0)).tolist()))}
    )
    with pytest.raises(UserError, match="case case0 has channels on different grids"):
        scores(KNN, Named(), other, cases=4)


def test_refusals():
    archive = labeled_archive()
    with pytest.raises(ConfigError, match="knn looks at an encoder's features"):
        list(KNN(KNN.Config()).run(Predictor(Threshold(), card()), archive))
    with pytest.raises(UserError, match=r"no labeled training case in split 'default' of MR alone"):
        scores(KNN, Named(), archive, modalities=("MR",))
    archive.set_split(train=("p0", "p1"), development=())
    with pytest.raises(UserError, match="no labeled case in subset 'development'"):
        scores(KNN, Named(), archive)


# -- parts ---------------------------------------------------------------------------------------------------


def test_dice_is_that_of_all_voxels_though_few_are_sampled():
    archive = labeled_archive()
    rng = np.random.default_rng(0)
    truth = rng.choice(3, 60_000, p=(0.95, 0.03, 0.02))
    said = np.where(rng.random(60_000) < 0.02, 1, truth)
    exact = 2 * ((said == 1) & (truth == 1)).sum() / ((said == 1).sum() + (truth == 1).sum())
    estimates = []
    for _ in range(30):
        chosen, count_K = sample(truth.reshape(30, 40, 50), np.ones((30, 40, 50), bool), 3, 6000, rng)
        rare = int((truth == 2).sum())
        assert np.bincount(truth[chosen]).tolist() == [4500 - rare, 1500, rare]
        voxels = Voxels({}, truth[chosen], count_K, count_K)
        (row, _) = _case_rows("case1", archive, voxels, said[chosen], method="encoder", draw=0)
        estimates.append(row["dice"])
    assert np.mean(estimates) == pytest.approx(exact, abs=0.01)
    assert np.std(estimates) < 0.04
    everything = Voxels({}, truth, count_K, count_K)
    (row, _) = _case_rows("case1", archive, everything, said, method="encoder", draw=0)
    assert row["dice"] == pytest.approx(exact)


def test_windows_cover_a_small_case_and_centre_on_classes_of_a_large_one():
    label = np.zeros((20, 9, 31), np.uint8)
    label[3, 4, 28], label[17, 4, 2] = 1, 2
    rng = np.random.default_rng(0)
    tiles = windows_of(label, (8, 12, 16), None, rng)
    covered = np.zeros(label.shape, bool)
    for d, h, w in tiles:
        covered[max(d, 0) : d + 8, max(h, 0) : h + 12, max(w, 0) : w + 16] = True
    assert len(tiles) == 6
    assert covered.all()
    few = windows_of(label, (8, 12, 16), 2, rng)
    for d, h, w in few:
        assert 0 <= d <= 12
        assert h == -2
        assert 0 <= w <= 15
    seen = {int(label[d : d + 8, :, w : w + 16].max()) for d, _, w in few}
    assert seen == {1, 2}, "classes take turns"


class Halved(nn.Module):
    """The image at half the resolution per axis, but for the second axis."""

    channels, strides = (1,), ((2, 1, 2),)

    def forward(self, image_BCDHW, spacing_mm_B3=None):
        return [nn.functional.avg_pool3d(image_BCDHW, (2, 1, 2))]


def test_maps_are_read_voxel_centre_to_voxel_centre():
    d, h, w = np.meshgrid(np.arange(8.0), np.arange(5.0), np.arange(12.0), indexing="ij")
    crop = (d * 100 + h * 10 + w).astype(np.float32)
    places = np.stack([a.ravel() for a in np.meshgrid(range(1, 7), range(5), range(1, 11), indexing="ij")], 1)
    encoder = FrozenEncoder(Halved(), card(kind="encoder"))
    (read,) = encoder.at_voxels(crop[None, None], [places], spacing_mm=(1, 1, 1), levels=[-1], batch_size=1)
    assert read.shape == (len(places), 1)
    assert np.allclose(read[:, 0].numpy(), crop[tuple(places.T)], atol=1e-3)
