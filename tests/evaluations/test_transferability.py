"""The estimate reads training labels alone, prefers an encoder that tells the classes, draws the same voxels again."""

import numpy as np
import pytest
import torch
from torch import nn

from medseg_ssl.config import ConfigError, UserError
from medseg_ssl.evaluations.transferability import (
    Transferability,
    draw_voxels,
    estimate,
    labeled_views,
    voxel_features,
)
from medseg_ssl.inference.frozen import FrozenEncoder
from medseg_ssl.types import UNKNOWN_LABEL, ViewSpec
from tests.train.archives import TRAIN, write_archive

from .fakes import card

SPEC = ViewSpec(count=1, size=(8, 12, 10), labeled=True)


class Levels(nn.Module):
    """The image itself, and its mean over blocks of 2x4x2 voxels: strides that differ per axis."""

    channels, strides = (1, 1), ((1, 1, 1), (2, 4, 2))

    def __init__(self, *, seeing=True):
        super().__init__()
        self.seeing = seeing
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, image_BCDHW, spacing_mm_B3=None):
        if not self.seeing:
            generator = torch.Generator().manual_seed(0)
            image_BCDHW = torch.randn(image_BCDHW.shape, generator=generator)
        return [image_BCDHW, nn.functional.avg_pool3d(image_BCDHW, (2, 4, 2))]


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return write_archive(tmp_path_factory.mktemp("transferability") / "archive")


@pytest.fixture(scope="module")
def views(archive):
    return labeled_views(archive, [f"case-{s}" for s in TRAIN], SPEC, crops=12, seed=0)


def test_voxels_are_even_over_the_classes_a_crop_shows_and_drawn_again(views):
    voxels = draw_voxels(views, places=40, seed=3)
    assert voxels.index_NP3.shape == (12, 40, 3)
    again = draw_voxels(views[:5], places=40, seed=3)
    assert np.array_equal(again.index_NP3, voxels.index_NP3[:5])
    for view, index_P3, class_P in zip(views, voxels.index_NP3, voxels.class_NP, strict=True):
        d, h, w = index_P3.T
        assert np.array_equal(view.label_BDHW[0].numpy()[d, h, w], class_P)
        shown = np.unique(view.label_BDHW[0].numpy())
        if len(shown) == 2:
            assert 8 <= (class_P == 1).sum() <= 32
    hidden = [type(views[0])(**{**vars(v), "valid_BDHW": torch.zeros_like(v.valid_BDHW)}) for v in views[:2]]
    assert set(draw_voxels(hidden, places=3, seed=0).class_NP.ravel()) == {UNKNOWN_LABEL}


def in_part(view):
    return type(view)(**{**vars(view), "known_classes_BK": torch.tensor([[True, False]])})


def test_background_of_a_case_that_states_some_classes_alone_tells_nothing(views):
    whole = draw_voxels(views, places=40, seed=3)
    half = [in_part(view) if number % 2 else view for number, view in enumerate(views)]
    part = draw_voxels(half, places=40, seed=3)
    assert np.array_equal(part.index_NP3, whole.index_NP3), "the places are the same"
    assert np.array_equal(part.class_NP[::2], whole.class_NP[::2])
    assert set(np.unique(part.class_NP[1::2])) == {1, UNKNOWN_LABEL}
    estimate(Levels(), half, part)  # pyright: ignore[reportArgumentType]
    every = [in_part(view) for view in views]
    three = draw_voxels(every, places=40, seed=3)
    three.class_NP[0, :2] = 2  # of a second class, so that there would be something to tell apart
    with pytest.raises(UserError, match="no voxel is known to be background"):
        estimate(Levels(), every, three)  # pyright: ignore[reportArgumentType]


def test_features_are_those_of_the_voxel_that_holds_the_place(views):
    voxels = draw_voxels(views[:2], places=9, seed=0)
    fine_NPE, coarse_NPE = voxel_features(Levels(), views[:2], voxels)  # pyright: ignore[reportArgumentType]
    for n, view in enumerate(views[:2]):
        image_DHW = view.image_BCDHW[0, 0]
        for p, (d, h, w) in enumerate(voxels.index_NP3[n]):
            assert fine_NPE[n, p, 0] == image_DHW[d, h, w].item()
            block = image_DHW[
                d // 2 * 2 : d // 2 * 2 + 2, h // 4 * 4 : h // 4 * 4 + 4, w // 2 * 2 : w // 2 * 2 + 2
            ]
            assert coarse_NPE[n, p, 0] == pytest.approx(block.mean().item(), abs=1e-5)


def test_an_encoder_that_sees_the_organ_is_preferred(views):
    voxels = draw_voxels(views, places=16, seed=0)
    seeing, blind = (estimate(Levels(seeing=s), views, voxels) for s in (True, False))  # pyright: ignore[reportArgumentType]
    assert seeing > blind + 0.1


def test_as_an_evaluation(archive):
    frozen = FrozenEncoder(Levels(), card(kind="encoder", crop_size=(8, 12, 10)))  # pyright: ignore[reportArgumentType]
    options = Transferability.Config(crops=6, places=8)
    (score,) = Transferability(options).run(frozen, archive)
    assert score.name == "logme"
    assert list(Transferability(options).run(frozen, archive)) == [score]
    with pytest.raises(ConfigError, match="encoder's features"):
        next(Transferability(options).run("predictor", archive))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="train"):
        Transferability.Config(subset="test")  # pyright: ignore[reportArgumentType]


def test_one_class_tells_nothing(views):
    background = [type(v)(**{**vars(v), "label_BDHW": torch.zeros_like(v.label_BDHW)}) for v in views[:3]]
    with pytest.raises(UserError, match="a single class"):
        estimate(Levels(), background, draw_voxels(background, places=4, seed=0))  # pyright: ignore[reportArgumentType]
