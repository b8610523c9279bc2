"""Feature pictures: radiological orientation, and one colour for one feature in every scan."""

import io

import numpy as np
import pytest
from PIL import Image
from torch import nn

from medseg_ssl.evaluations.feature_pca import Components, FeaturePCA, picture_png
from medseg_ssl.inference.frozen import FrozenEncoder
from tests.evaluations.fakes import MemoryArchive, card


class Itself(nn.Module):
    channels, strides = (1,), ((1, 1, 1),)

    def forward(self, image_BCDHW, spacing_mm_B3=None):
        return [image_BCDHW]


def decode(png):
    picture = np.asarray(Image.open(io.BytesIO(png)))
    half = picture.shape[1] // 2
    return picture[:, :half], picture[:, half:]


def archive_of_two(*, second=1.0):
    """Intensity grows to the patient's left of the array's columns in the first scan, backwards in the second."""
    archive = MemoryArchive(classes=())
    ramp = np.broadcast_to(np.linspace(-90, 140, 14, dtype=np.float32), (6, 10, 14))
    archive.add_scan("a", ramp.copy(), subject="p0", spacing=(2.0, 1.0, 1.0))
    archive.add_scan("b", ramp[..., ::-1] * second, subject="p1", spacing=(2.0, 1.0, 1.0))
    archive.set_split(development=("p0", "p1"))
    return archive


def scores(archive, **options):
    evaluation = FeaturePCA(FeaturePCA.Config(**{"crop_size": (6, 10, 14), **options}))
    return list(evaluation.run(FrozenEncoder(Itself(), card(kind="encoder")), archive))


def test_orientation_and_colours():
    found = scores(archive_of_two())
    assert [s.name for s in found] == ["variance/1", "variance/2", "variance/3"]
    assert [round(s.value, 6) for s in found] == [1, 0, 0]
    assert set(found[0].pictures) == {"CT-a", "CT-b"}
    grey_a, red_a = decode(found[0].pictures["CT-a"])
    _, red_b = decode(found[0].pictures["CT-b"])
    middle = red_a.shape[0] // 2
    # columns run towards the patient's right, and the picture shows that at its left
    assert red_a[middle, 5, 0] > 200 > 50 > red_a[middle, -5, 0]
    assert grey_a[middle, 5, 0] > grey_a[middle, -5, 0]
    assert np.abs(red_a.astype(int) - red_b[:, ::-1]).max() <= 2, "one colour, one feature, in every scan"
    assert (red_a[middle, 5, 1:] == 128).all(), "components that do not vary are grey"
    assert {n: p for n, p in found[0].pictures.items()} == scores(archive_of_two())[0].pictures


def test_signs_are_fixed_and_shares_known():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(500, 4)) @ np.diag([1.0, 1, 1, 0])
    axes = Components.of(features)
    assert axes.share_C.sum() == pytest.approx(1.0)
    again = Components.of(features[::-1])
    assert np.allclose(axes.axes_EC, again.axes_EC, atol=1e-6)
    assert (axes.axes_EC.max(axis=0) == np.abs(axes.axes_EC).max(axis=0)).all()
    assert Components.of(np.ones((5, 2))).share_C.tolist() == [0, 0, 0]


def test_the_picture_keeps_the_voxels_shape():
    rgb = np.zeros((10, 20, 3), np.uint8)
    picture = Image.open(io.BytesIO(picture_png(np.zeros((10, 20)), rgb, spacing_mm=(3.0, 1.0))))
    assert picture.size == (2 * 213, 320)
