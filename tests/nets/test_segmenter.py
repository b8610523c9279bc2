import pytest
import torch
from torch import nn

from medseg_ssl.nets.segmenter import silence


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_silenced_class_has_probability_0_and_no_gradient(dtype):
    torch.manual_seed(0)
    head = nn.Conv3d(4, 3, 1).to(dtype)
    before = head.weight[:2].clone()
    silence([head], [2])
    p = head(10 * torch.randn(2, 4, 5, 6, 7, dtype=dtype)).softmax(dim=1)
    assert p[:, 2].max() == 0.0
    torch.nn.functional.nll_loss((p + 1e-6).log(), torch.zeros(2, 5, 6, 7, dtype=torch.long)).backward()
    assert head.weight.grad is not None
    assert head.weight.grad[2].abs().max() == 0.0
    assert head.weight.grad[:2].abs().max() > 0.0
    assert torch.equal(head.weight[:2], before)


def test_background_cannot_be_silenced():
    with pytest.raises(ValueError, match="background"):
        silence([nn.Conv3d(4, 3, 1)], [0])
