import torch

from medseg_ssl.config import parse
from medseg_ssl.objectives.simclr import SimCLR
from medseg_ssl.types import Facts
from tests.objectives.conftest import make_batch, make_view


def build(encoder, **options):
    torch.manual_seed(1)
    return SimCLR(parse(SimCLR.Config, {"size": [16, 16, 16], "points": 16, **options}), encoder, Facts())


def pair(batch=4, same=True):
    a = make_view((16, 16, 16), batch=batch, seed=1)
    b = make_view((16, 16, 16), batch=batch, seed=1 if same else 2)
    return make_batch({"pair": [a, b]})


def test_equal_views_give_the_least_loss(encoder):
    simclr = build(encoder, temperature=0.1).eval()
    assert simclr(pair(same=True), 0.0).loss < simclr(pair(same=False), 0.0).loss


def test_dense_term_trains_and_ships_the_decoder(encoder):
    plain, dense = build(encoder), build(encoder, dense_weight=1.0)
    assert plain.export().decoder is None
    assert dense.export().decoder is dense.decoder
    out = dense(pair(), 0.0)
    out.loss.backward()
    assert {"global_loss", "dense_loss", "dense_top1"} <= set(out.logs)
    gradients = [p.grad for p in dense.decoder.parameters()]
    assert sum(g.abs().sum() for g in gradients if g is not None) > 0


def test_no_data_does_not_enter_the_pooled_vector(encoder):
    simclr = build(encoder).eval()
    batch = pair()
    for view in batch.views["pair"]:
        view.valid_BDHW[:, 8:] = False
    pooled = simclr(batch, 0.0).features_BE
    maps = encoder(batch.views["pair"][0].image_BCDHW)
    size = maps[-1].shape[2]
    assert torch.allclose(pooled[:4], maps[-1][:, :, : size // 2].mean((2, 3, 4)), atol=1e-5)
