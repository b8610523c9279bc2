import pytest
import torch

from medseg_ssl.config import UserError
from medseg_ssl.train.health import FeatureRank, FiniteGuard, Means, effective_rank
from tests.train.conftest import run_tiny


def test_rank_known_answers():
    generator = torch.Generator().manual_seed(0)
    full = torch.randn(4000, 8, generator=generator)
    assert effective_rank(full) == pytest.approx(8, abs=0.05)
    assert effective_rank(full[:, :1] @ torch.ones(1, 8)) == pytest.approx(1, abs=0.01)
    assert effective_rank(full + 100) == pytest.approx(8, abs=0.05), "a common mean neither helps nor harms"
    assert effective_rank(torch.ones(50, 8) + 1e-6 * full[:50]) == 1.0, "collapsed but for noise"
    assert effective_rank(torch.zeros(50, 8)) == 1.0
    wide = torch.randn(20, 300, generator=generator)
    assert 15 < effective_rank(wide) <= 19


def test_rank_waits_for_enough_rows_and_forgets_old_ones():
    rank = FeatureRank()
    rank.add(None)
    rank.add(torch.randn(8, 4))
    assert rank.value() is None
    for _ in range(100):
        rank.add(torch.ones(8, 4))
    assert rank.value() == 1.0
    rank.add(torch.full((8, 4), float("nan")))
    assert rank.value() is None


def test_collapse_is_warned_of(tmp_path):
    from tests.train.conftest import TinyObjective

    original = TinyObjective.forward

    def collapsed(self, batch, progress):
        output = original(self, batch, progress)
        return output._replace(features_BE=torch.ones_like(output.features_BE))

    TinyObjective.forward = collapsed
    try:
        run_tiny(tmp_path)
    finally:
        TinyObjective.forward = original
    assert "features collapse" in (tmp_path / "warnings.txt").read_text()


def test_guard_names_what_is_not_finite():
    guard = FiniteGuard(torch.device("cpu"))
    one, broken = torch.tensor(1.0), torch.tensor(float("inf"))
    guard.add(0, one, one, [("a",)])
    with pytest.raises(
        UserError, match=r"the gradient's norm is inf at step 2; scans in this batch: a\+b, c"
    ):
        guard.add(1, one, broken, [("a", "b"), ("c",)])


def test_means_count_each_name_for_itself():
    means = Means()
    means.add(a=torch.tensor(1.0), b=torch.tensor(10.0))
    means.add(a=torch.tensor(3.0))
    assert {k: float(v) for k, v in means.take().items()} == {"a": 2.0, "b": 10.0}
    assert means.take() == {}
