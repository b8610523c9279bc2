import pytest
import torch
from lightly.loss import NTXentLoss

from medseg_ssl.nets.contrast import nt_xent, pair_info_nce
from medseg_ssl.nets.correspondence import Points, dense_info_nce


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_nt_xent_is_lightlys_loss_and_gradient(temperature):
    generator = torch.Generator().manual_seed(0)
    ours = [torch.randn(5, 8, generator=generator, requires_grad=True) for _ in range(2)]
    theirs = [x.detach().clone().requires_grad_() for x in ours]
    found = nt_xent(*ours, temperature=temperature)
    expected = NTXentLoss(temperature=temperature)(*theirs)
    found.backward()
    expected.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-6)


def test_of_identical_embeddings_it_is_the_log_of_the_candidates():
    z = torch.ones(4, 8)
    assert nt_xent(z, z, temperature=0.5).item() == pytest.approx(torch.tensor(7.0).log().item(), rel=1e-6)


def test_it_is_float32_under_autocast():
    z = torch.randn(4, 8, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = nt_xent(z, z.flip(0), temperature=0.1)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(
        nt_xent(z.float(), z.float().flip(0), temperature=0.1).item(), rel=1e-6
    )


@pytest.mark.parametrize("loss", ["pair", "dense"])
def test_similarities_are_float32_under_autocast_too(loss):
    """Near 1 bfloat16 knows steps of .004, which a temperature of .01 makes .4 of a logit."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(1, 6, 8, generator=generator) for _ in range(2))

    def value():
        if loss == "pair":
            scale = torch.tensor(100.0)
            return pair_info_nce(a[0], b[0], torch.arange(6), scale=scale)[0]
        far = 100.0 * torch.arange(6.0)[None, :, None].expand(1, 6, 3)
        points = Points(far, far, far, torch.ones(1, 6, dtype=torch.bool))
        return dense_info_nce(a, b, points, temperature=0.01, radius_mm=4.0)[0]

    expected = value()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = value()
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
