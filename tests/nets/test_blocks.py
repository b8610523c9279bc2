import pytest
import torch
import torch.nn.functional as F

from medseg_ssl.nets.blocks import upsample_linear


@pytest.mark.parametrize("factor", [(1, 2, 2), (2, 2, 2), (4, 1, 3)])
@pytest.mark.parametrize("cells", [(3, 5, 4), (1, 2, 1)])
def test_upsampling_has_the_numbers_of_torch(factor, cells):
    torch.manual_seed(0)
    coarse = torch.randn(2, 3, *cells, dtype=torch.float64)
    size = [n * f for n, f in zip(cells, factor, strict=True)]
    expected = F.interpolate(coarse, size=size, mode="trilinear", align_corners=False)
    assert torch.allclose(upsample_linear(coarse, factor, size=size), expected, atol=1e-12)


def test_upsampling_to_a_size_that_the_factor_does_not_divide_cuts_the_end_off():
    coarse = torch.randn(1, 2, 3, 4, 5)
    whole = upsample_linear(coarse, (2, 2, 2), size=(6, 8, 10))
    assert torch.equal(upsample_linear(coarse, (2, 2, 2), size=(5, 7, 9)), whole[:, :, :5, :7, :9])
