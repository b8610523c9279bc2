"""A network trained on slices predicts a volume slice by slice."""

import numpy as np
import pytest
import torch

from medseg_ssl.inference.predictor import Predictor
from tests.evaluations.fakes import MemoryArchive, card


class Brightest(torch.nn.Module):
    """Foreground where a voxel is brighter than the mean of all it sees: a look at another slice changes the answer."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, image_BCDHW, spacing_mm_B3=None):
        self.seen.append(tuple(image_BCDHW.shape[2:]))
        value = image_BCDHW - image_BCDHW.mean((2, 3, 4), keepdim=True)
        return torch.cat([-value, value], dim=1)


def steps(depth, height, width):
    """Slice k is bright by 10 k, and in its last k + 1 columns by 5 more."""
    volume = np.zeros((depth, height, width), np.float32)
    for k in range(depth):
        volume[k] = 10 * k
        volume[k, :, -(k + 1) :] += 5
    return volume


def predict(volume, crop_size, **options):
    archive = MemoryArchive()
    archive.add_scan("s", volume, subject="p", spacing=(4.0, 1.0, 1.0))
    archive.add_case("c", ["s"], np.zeros(volume.shape, np.uint8))
    one = Predictor(Brightest(), card(crop_size=crop_size), **options)
    return one.predict_case(archive, "c"), set(one.segmenter.seen)


@pytest.mark.parametrize("stride", [(1, 4, 4), (8, 8, 8)], ids=str)
@pytest.mark.parametrize("depth", [1, 2, 7])
def test_each_slice_by_itself(depth, stride):
    volume = steps(depth, 16, 24)
    label, seen = predict(volume, (1, 16, 24), stride=stride)
    expected = volume > volume.mean((1, 2), keepdims=True)
    np.testing.assert_array_equal(label, expected)
    assert seen == {(1, 16, 24)}


def test_slices_larger_than_the_crop_are_stitched_in_their_plane():
    volume = steps(5, 24, 56)
    label, seen = predict(volume, (1, 16, 24), overlap=0.0)
    assert label.shape == volume.shape
    assert seen == {(1, 16, 24)}
    lit = label.any((1, 2))
    assert lit.all()


def test_along_any_axis():
    volume = np.ascontiguousarray(steps(3, 16, 24).transpose(1, 0, 2))
    label, seen = predict(volume, (16, 1, 24), stride=(2, 2, 2))
    np.testing.assert_array_equal(label, volume > volume.mean((0, 2), keepdims=True))
    assert seen == {(16, 1, 24)}


def test_a_few_slices_are_seen_together():
    volume = steps(9, 16, 24)
    label, seen = predict(volume, (3, 16, 24), stride=(1, 4, 4))
    assert label.shape == volume.shape
    assert seen == {(3, 16, 24)}
