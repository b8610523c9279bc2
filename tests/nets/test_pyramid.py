import pytest
import torch

from medseg_ssl.nets.pyramid import Pyramid, PyramidConfig, level_strides

STRIDES = {
    (8, 8, 8): ((1, 1, 1), (2, 2, 2), (4, 4, 4), (8, 8, 8)),
    (1, 16, 16): ((1, 1, 1), (1, 2, 2), (1, 4, 4), (1, 8, 8), (1, 16, 16)),
    (4, 16, 16): ((1, 1, 1), (1, 2, 2), (1, 4, 4), (2, 8, 8), (4, 16, 16)),
    (1, 14, 14): ((1, 1, 1), (1, 7, 7), (1, 14, 14)),
    (3, 6, 6): ((1, 1, 1), (1, 3, 3), (3, 6, 6)),
    (1, 1, 1): ((1, 1, 1), (1, 1, 1)),
}


@pytest.mark.parametrize(("patch", "strides"), STRIDES.items(), ids=str)
def test_strides_halve_the_patch(patch, strides):
    assert level_strides(patch) == strides


@pytest.mark.parametrize("image", [True, False])
@pytest.mark.parametrize("patch", STRIDES, ids=str)
def test_maps_have_the_promised_sizes_and_every_parameter_learns(patch, image):
    torch.manual_seed(0)
    pyramid = Pyramid(PyramidConfig(image=image), 24, patch, 2)
    size = (6, 30, 33)
    sizes = [tuple(-(-n // s) for n, s in zip(size, stride, strict=True)) for stride in pyramid.strides]
    tokens, crop = torch.randn(2, 24, *sizes[-1]), torch.randn(2, 2, *size)
    maps = pyramid(tokens, crop)
    assert [tuple(m.shape[2:]) for m in maps] == sizes
    assert tuple(m.shape[1] for m in maps) == pyramid.channels
    assert maps[-1] is tokens
    sum((m * torch.randn(m.shape)).sum() for m in maps).backward()
    for name, parameter in pyramid.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_details_come_from_the_image_and_a_place_keeps_its_place():
    torch.manual_seed(0)
    pyramid = Pyramid(PyramidConfig(widths=(4, 6, 8)), 12, (8, 8, 8), 1)
    tokens, image = torch.randn(1, 12, 2, 3, 4), torch.zeros(1, 1, 16, 24, 32)
    before = pyramid(tokens, image)
    assert pyramid.channels == (4, 6, 8, 12)
    image[0, 0, 10, 5, 20] = 50.0
    changed = (pyramid(tokens, image)[0] - before[0]).abs().sum(1)[0]
    place = torch.unravel_index(changed.argmax(), changed.shape)
    assert all(abs(int(p) - q) <= 1 for p, q in zip(place, (10, 5, 20), strict=True))
    blind = Pyramid(PyramidConfig(image=False), 12, (8, 8, 8), 1)
    for a, b in zip(blind(tokens, image), blind(tokens, torch.zeros_like(image)), strict=True):
        assert torch.equal(a, b)


def test_every_voxel_of_the_image_counts():
    """Also where a step is wider than the kernel."""
    torch.manual_seed(0)
    pyramid = Pyramid(PyramidConfig(), 12, (1, 14, 14), 1)
    image = torch.randn(1, 1, 2, 28, 28, requires_grad=True)
    maps = pyramid(torch.randn(1, 12, 2, 2, 2), image)
    (maps[1] * torch.randn(maps[1].shape)).sum().backward()
    assert image.grad is not None
    assert (image.grad != 0).all()


def test_widths_are_one_per_level():
    with pytest.raises(ValueError, match=r"pyramid.widths \(8, 8\) must be 3 positive numbers"):
        Pyramid(PyramidConfig(widths=(8, 8)), 12, (8, 8, 8), 1)
