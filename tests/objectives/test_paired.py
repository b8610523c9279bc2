import math

import pytest
import torch

from medseg_ssl.config import ConfigError, parse
from medseg_ssl.nets.contrast import pair_info_nce
from medseg_ssl.nets.heads import pool
from medseg_ssl.objectives.paired import Paired
from medseg_ssl.types import Facts
from tests.objectives.conftest import make_batch, make_view

FACTS = Facts(relations=("registered", "same_study", "same_subject"))


def build(encoder, facts=FACTS, **options):
    torch.manual_seed(1)
    return Paired(parse(Paired.Config, {"size": [16, 16, 16], "points": 16, **options}), encoder, facts)


def pair(relation, batch=3):
    a, b = make_view((16, 16, 16), batch=batch, seed=1), make_view((16, 16, 16), batch=batch, seed=2)
    return make_batch({"pair": [a, b]}, relation=relation)


def test_refuses_relations_it_cannot_use(encoder):
    with pytest.raises(ConfigError, match="'same_subject', which paired cannot use"):
        parse(Paired.Config, {"relations": ["registered", "same_subject"]})
    with pytest.raises(ConfigError, match="voxel term cannot use same_study"):
        parse(Paired.Config, {"relations": ["same_study"], "global_weight": 0})
    with pytest.raises(ConfigError, match="the archive has: same_subject"):
        build(encoder, Facts(relations=("same_subject",)))
    with pytest.raises(ValueError, match="paired got relation 'same_subject'"):
        build(encoder)(pair("same_subject"), 0.0)


def test_unaligned_pairs_enter_the_global_term_only(encoder):
    paired = build(encoder).eval()
    assert paired(pair("same_study"), 0.0).logs["dense_loss"] == 0.0
    assert paired(pair("registered"), 0.0).logs["dense_loss"] > 0.0


def test_global_loss_known_answers():
    eye = torch.eye(4)
    subjects = torch.arange(4)
    loss, top1 = pair_info_nce(eye, eye, subjects, scale=torch.tensor(50.0))
    assert loss < 1e-4
    assert top1 == 1.0
    ones = torch.ones(4, 4)
    loss, _ = pair_info_nce(ones, ones, subjects, scale=torch.tensor(10.0))
    assert loss.item() == pytest.approx(torch.log(torch.tensor(4.0)).item())
    same = torch.zeros(4, dtype=torch.long)
    loss, _ = pair_info_nce(ones, ones, same, scale=torch.tensor(10.0))
    assert loss == 0.0, "views of one subject are no negatives of each other"


@pytest.mark.parametrize("how", ["mean", "mean_max"])
def test_without_a_projection_the_encoders_own_features_are_compared(encoder, how):
    paired = build(encoder, projection="none", pool=how, dense_weight=0.0).eval()
    batch = pair("registered")
    batch.subject_B = ["a", "b", "c"]
    a, b = batch.views["pair"]
    own = [pool(encoder(v.image_BCDHW, v.spacing_mm_B3)[-1], v.valid_BDHW, how=how) for v in (a, b)]
    expected, _ = pair_info_nce(*own, torch.arange(3), scale=torch.tensor(10.0))
    assert paired(batch, 0.0).loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert not [n for n, _ in paired.named_parameters() if n.startswith("project")]


def test_a_temperature_that_fell_too_low_comes_back(encoder):
    """Each view shows another subject's pair: the lower the temperature, the larger the loss."""
    paired = build(encoder, dense_weight=0.0, temperature=0.01).eval()
    batch = pair("registered")
    a, b = batch.views["pair"]
    a.image_BCDHW = b.image_BCDHW.roll(1, 0)
    with torch.no_grad():
        paired.log_scale += 0.5  # as a step may leave it
    paired.after_step(0.0)
    assert paired.log_scale.item() == pytest.approx(math.log(100.0))
    paired(batch, 0.0).loss.backward()
    assert paired.log_scale.grad > 0
    torch.optim.SGD([paired.log_scale], lr=0.1).step()
    paired.after_step(0.0)
    assert paired.log_scale.item() < math.log(100.0) - 1e-3


def test_the_temperature_starts_where_it_may_be(encoder):
    with pytest.raises(ConfigError, match=r"temperature: .*greater than or equal to 0\.01"):
        parse(Paired.Config, {"temperature": 0.005})
    before = (paired := build(encoder)).log_scale.clone()
    paired.after_step(0.0)
    assert torch.equal(paired.log_scale, before), "below the limit nothing is changed"
    build(encoder, global_weight=0.0).after_step(0.0)


def test_all_parameters_learn(encoder):
    paired = build(encoder)
    paired(pair("registered"), 0.0).loss.backward()
    named = {n for n, p in paired.named_parameters() if p.grad is None}
    # the decoder's coarser outputs feed the finest one, so every weight must be reached
    assert not named
