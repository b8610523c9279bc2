import pytest
import torch

from medseg_ssl.nets.restoration import Restoration
from tests.objectives.conftest import make_view


def test_error_known_answers():
    restored = torch.zeros(1, 1, 2, 2, 2)
    target = torch.tensor([0.0, 1, 2, 9, -9, 0, 0, 0]).reshape(1, 1, 2, 2, 2)
    counted = torch.tensor([1, 1, 1, 1, 1, 0, 0, 0], dtype=torch.bool).reshape(1, 2, 2, 2)
    error = Restoration().error
    assert error(restored, target, counted).item() == pytest.approx((0 + 1 + 4 + 25 + 9) / 5)
    assert error(restored, target, torch.zeros_like(counted)).item() == 0.0
    absolute = Restoration(loss="l1", target_range=(-1, 1)).error(restored, target, counted)
    assert absolute.item() == pytest.approx((0 + 1 + 1 + 1 + 1) / 5)
    robust = Restoration(loss="charbonnier", target_range=(-1, 1)).error(restored, target, counted)
    assert robust.item() == pytest.approx((1e-3 + 4 * (1 + 1e-6) ** 0.5) / 5)


def test_what_counts():
    view = make_view((4, 4, 4))
    view.valid_BDHW[:, 0] = False
    view.foreground_BDHW[:, 1] = False
    hidden = torch.ones_like(view.valid_BDHW)
    hidden[:, 2] = False
    assert Restoration().counted(view, hidden).flatten(2).all(2)[0].tolist() == [False, False, False, True]
    everywhere = Restoration(foreground_only=False).counted(view)
    assert everywhere.flatten(2).all(2)[0].tolist() == [False, True, True, True]
