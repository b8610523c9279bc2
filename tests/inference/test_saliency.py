"""Saliency of segmenters whose gradient is known."""

import numpy as np
import pytest
import torch

from medseg_ssl.inference.predictor import Predictor
from medseg_ssl.inference.saliency import input_saliency
from tests.evaluations.fakes import MemoryArchive, card


class Looks(torch.nn.Module):
    """Foreground logit: high at two places, where it is the voxel ``step`` further along D."""

    def __init__(self, step=0):
        super().__init__()
        self.step = step

    def forward(self, image_BCDHW, spacing_mm_B3=None):
        moved = image_BCDHW.roll(-self.step, dims=2)[:, :1]
        logit = torch.full_like(moved, -20.0)
        logit = logit + 0.0 * moved
        logit[:, :, 8, 5, 11] = 20.0 + moved[:, :, 8, 5, 11]
        return torch.cat([torch.zeros_like(logit), logit], dim=1)


def archive_of(shape, at):
    archive = MemoryArchive()
    archive.add_scan("s", np.random.default_rng(0).normal(100, 20, shape), subject="p")
    label = np.zeros(shape, np.uint8)
    label[at] = 1
    archive.add_case("c", ["s"], label)
    return archive


@pytest.mark.parametrize("step", [0, 2])
def test_it_lies_where_the_network_looks_not_where_it_speaks(step):
    archive = archive_of((16, 16, 16), (8, 5, 11))
    found = input_saliency(Predictor(Looks(step), card()), archive, "c")
    assert found.shape == (16, 16, 16)
    assert np.unravel_index(found.argmax(), found.shape) == (8 + step, 5, 11)
    assert found.max() == pytest.approx(1.0, abs=1e-4)
    assert found.sum() == pytest.approx(found.max(), abs=1e-4)


def test_the_crop_lies_around_the_label_and_the_rest_is_zero():
    archive = archive_of((40, 16, 20), (30, 5, 11))
    found = input_saliency(Predictor(Looks(), card()), archive, "c")
    # 16 slices around slice 30: 22 or 23 to 38; the network speaks at the ninth of the crop
    assert found.shape == (40, 16, 20)
    assert found[:22].max() == 0
    assert np.unravel_index(found.argmax(), found.shape)[0] in (30, 31)


def test_it_repeats_itself_and_changes_no_weight():
    archive = archive_of((9, 12, 20), (4, 5, 11))
    net = torch.nn.Conv3d(1, 2, 3, padding=1)
    before = net.weight.detach().clone()

    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, image_BCDHW, spacing_mm_B3=None):
            return self.net(image_BCDHW)

    predictor = Predictor(Plain(), card())
    first = input_saliency(predictor, archive, "c")
    np.testing.assert_array_equal(first, input_saliency(predictor, archive, "c"))
    assert first.min() >= 0
    assert torch.equal(net.weight, before)
    assert net.weight.grad is None
