import pytest
import torch

from medseg_ssl.config import ConfigError, parse
from medseg_ssl.objectives.mae import MAE
from medseg_ssl.types import Facts
from tests.objectives.conftest import make_batch, make_view


def build(encoder, **options):
    config = parse(MAE.Config, {"size": [16, 24, 32], "hiding": {"block": [4, 8, 8]}, **options})
    torch.manual_seed(1)
    return MAE(config, encoder, Facts())


def one_batch(size=(16, 24, 32), **kwargs):
    return make_batch({"crop": [make_view(size, **kwargs)]})


def test_hidden_depends_on_seed_and_sample_index_alone(encoder):
    mae = build(encoder)
    a = make_batch({"crop": [make_view((16, 24, 32), seed=1)]}, first=6)
    b = make_batch({"crop": [make_view((16, 24, 32), seed=2)]}, first=7)
    assert torch.equal(mae.hidden(a)[1], mae.hidden(b)[0])


def test_loss_region_is_the_hidden_foreground_and_nothing_else(encoder):
    """A change of the target outside hidden body voxels changes nothing, inside it does (a peer got this wrong)."""
    mae = build(encoder).eval()
    batch = one_batch()
    view = batch.views["crop"][0]
    view.foreground_BDHW[:, :4] = False
    view.valid_BDHW[:, :, :4] = False
    view.clean_BCDHW = view.image_BCDHW.clone()
    hidden = mae.hidden(batch)
    counted = hidden & view.valid_BDHW & view.foreground_BDHW
    before = mae(batch, 0.0).loss
    view.clean_BCDHW[~counted[:, None]] += 1.0
    assert torch.equal(mae(batch, 0.0).loss, before)
    view.clean_BCDHW[counted[:, None]] += 1.0
    assert not torch.allclose(mae(batch, 0.0).loss, before)


def test_hidden_voxels_never_reach_the_network(encoder):
    mae = build(encoder).eval()
    batch = one_batch()
    view = batch.views["crop"][0]
    hidden = mae.hidden(batch)
    before, _ = mae.restore(view, hidden)
    view.image_BCDHW = view.image_BCDHW.masked_fill(hidden[:, None], 99.0)
    after, _ = mae.restore(view, hidden)
    assert torch.equal(before, after)


def test_a_learned_fill_stands_in_hidden_voxels_and_is_trained(encoder):
    mae = build(encoder, fill="learned")
    batch = one_batch()
    mae(batch, 0.0).loss.backward()
    assert mae.fill.grad is not None
    assert mae.fill.grad.abs().max() > 0
    view, hidden = batch.views["crop"][0], mae.eval().hidden(batch)
    with torch.no_grad():
        before, _ = mae.restore(view, hidden)
        mae.fill += 1.0
        after, _ = mae.restore(view, hidden)
        nothing, _ = mae.restore(view, torch.zeros_like(hidden))
        mae.fill -= 1.0
        assert torch.equal(mae.restore(view, torch.zeros_like(hidden))[0], nothing)
    assert not torch.allclose(before, after)
    assert not build(encoder).fill.requires_grad


def test_wrong_options():
    with pytest.raises(ConfigError, match="ratio must be"):
        parse(MAE.Config, {"hiding": {"ratio": [0.8, 0.6]}})
    with pytest.raises(ConfigError, match="does not fit into size"):
        parse(MAE.Config, {"size": [8, 8, 8], "hiding": {"block": [16, 4, 4]}})
