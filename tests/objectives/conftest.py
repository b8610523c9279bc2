"""Batches made by hand, with affines that are known."""

import pytest
import torch

from medseg_ssl.types import Batch, View


def make_view(
    size=(16, 20, 24),
    *,
    batch=2,
    channels=1,
    seed=0,
    shift=(0.0, 0.0, 0.0),
    spacing=(3.0, 2.0, 1.0),
    label=None,
):
    generator = torch.Generator().manual_seed(seed)
    affine = torch.zeros(batch, 4, 4, dtype=torch.float64)
    # index (D, H, W) → (x, y, z): x grows with W, y with H, z with D
    affine[:, 2, 0], affine[:, 1, 1], affine[:, 0, 2], affine[:, 3, 3] = *spacing, 1.0
    affine[:, :3, 3] = torch.tensor([shift[2] * spacing[2], shift[1] * spacing[1], shift[0] * spacing[0]])
    return View(
        image_BCDHW=torch.randn(batch, channels, *size, generator=generator),
        valid_BDHW=torch.ones(batch, *size, dtype=torch.bool),
        foreground_BDHW=torch.ones(batch, *size, dtype=torch.bool),
        affine_B44=affine,
        spacing_mm_B3=torch.tensor([spacing] * batch),
        modality_B=["CT"] * batch,
        label_BDHW=label,
        known_classes_BK=None,
    )


def make_batch(views, *, relation="", first=0, seed=0):
    count = len(next(iter(views.values()))[0].image_BCDHW)
    return Batch(
        views=views,
        subject_B=[f"s{i}" for i in range(count)],
        relation_B=[relation] * count,
        sample_index_B=torch.arange(first, first + count),
        seed=seed,
    )


@pytest.fixture
def encoder():
    from medseg_ssl.nets.encoders.resenc import ResEnc

    torch.manual_seed(0)
    return ResEnc(ResEnc.Config(size="tiny"), channels_in=1)
