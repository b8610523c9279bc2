import copy

import pytest
import torch

from medseg_ssl.config import ConfigError, parse
from medseg_ssl.nets.encoders.resenc import ResEnc
from medseg_ssl.nets.packed import PackedPass
from medseg_ssl.nets.sparse import DensePass
from medseg_ssl.objectives.spark import Densify, SparK
from medseg_ssl.types import Facts
from tests.nets.test_shelf_contracts import shake
from tests.objectives.conftest import make_batch, make_view
from tests.shelves import build_encoder

SIZE = (16, 24, 32)
EVEN = {"hiding": {"block": [8, 8, 8], "ratio": [0.75, 0.75]}}


def build(encoder, **options):
    config = parse(SparK.Config, {"size": SIZE, "hiding": {"block": [8, 8, 8]}, **options})
    torch.manual_seed(1)
    spark = SparK(config, encoder, Facts())
    shake(spark)
    return spark


def one_batch(size=SIZE, **kwargs):
    return make_batch({"crop": [make_view(size, **kwargs)]})


def test_hidden_depends_on_seed_and_sample_index_alone(encoder):
    spark = build(encoder)
    a = make_batch({"crop": [make_view(SIZE, seed=1)]}, first=6)
    b = make_batch({"crop": [make_view(SIZE, seed=2)]}, first=7)
    assert torch.equal(spark.hidden(a)[1], spark.hidden(b)[0])


@pytest.mark.parametrize("options", [{}, EVEN], ids=["dense", "packed"])
def test_loss_region_is_the_hidden_foreground_and_nothing_else(encoder, options):
    spark = build(encoder, **options).eval()
    batch = one_batch()
    view = batch.views["crop"][0]
    view.foreground_BDHW[:, :4] = False
    view.valid_BDHW[:, :, :4] = False
    view.clean_BCDHW = view.image_BCDHW.clone()
    hidden = spark.hidden(batch)
    counted = hidden & view.valid_BDHW & view.foreground_BDHW
    before = spark(batch, 0.0).loss
    view.clean_BCDHW[~counted[:, None]] += 1.0
    assert torch.equal(spark(batch, 0.0).loss, before)
    view.clean_BCDHW[counted[:, None]] += 1.0
    assert not torch.allclose(spark(batch, 0.0).loss, before)


@pytest.mark.parametrize("options", [{}, EVEN, {"densify": "coarse"}], ids=["dense", "packed", "coarse"])
def test_hidden_voxels_never_reach_the_network(encoder, options):
    spark = build(encoder, **options).eval()
    batch = one_batch()
    view = batch.views["crop"][0]
    hidden = spark.hidden(batch)
    before = spark.restore(view, hidden)
    view.image_BCDHW = view.image_BCDHW.masked_fill(hidden[:, None], 99.0)
    after = spark.restore(view, hidden)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    view.image_BCDHW = view.image_BCDHW.masked_fill(~hidden[:, None], 99.0)
    assert not torch.allclose(spark.restore(view, hidden)[0], before[0])


def test_packed_and_dense_are_one_objective(encoder):
    batch, found = one_batch(), []
    shared = copy.deepcopy(build(encoder, **EVEN).state_dict())
    for compute in ("dense", "packed"):
        spark = build(encoder, **EVEN, compute=compute)
        spark.load_state_dict(shared)
        spark.zero_grad()
        output = spark(batch, 0.0)
        output.loss.backward()
        found.append((output, {n: p.grad.clone() for n, p in spark.named_parameters()}))
    (dense, dense_gradients), (packed, packed_gradients) = found
    assert torch.allclose(dense.loss, packed.loss, rtol=1e-5)
    assert torch.allclose(dense.features_BE, packed.features_BE, atol=1e-5)
    largest = max(gradient.abs().max().item() for gradient in dense_gradients.values())
    for name, gradient in dense_gradients.items():
        assert torch.allclose(gradient, packed_gradients[name], rtol=1e-3, atol=1e-5 * largest), name


def test_it_packs_where_every_sample_shows_as_many_blocks(encoder):
    hidden = torch.zeros(2, *SIZE, dtype=torch.bool)
    assert isinstance(build(encoder, **EVEN).visible_pass(hidden), PackedPass)
    assert isinstance(build(encoder, **EVEN, compute="dense").visible_pass(hidden), DensePass)
    for other in (
        {"hiding": {"block": [8, 8, 8], "ratio": [0.6, 0.75]}},
        {"hiding": {"block": [8, 8, 8], "ratio": [0.6, 0.6], "strategy": "foreground"}},
        {"hiding": {"block": [16, 16, 16], "ratio": [0.6, 0.6]}},
    ):
        assert isinstance(build(encoder, **other).visible_pass(hidden), DensePass)
        with pytest.raises(ConfigError, match=r"as many visible blocks in every sample.*compute: dense"):
            build(encoder, **other, compute="packed")


WIDE = {"features": (4, 6), "blocks": (1, 2), "kernels": ((3, 3, 3), (5, 5, 5))}


def test_what_can_be_packed_is_tried_with_the_blocks_that_are_hidden():
    encoder = ResEnc(ResEnc.Config(**WIDE))
    for block, packed in (((2, 2, 2), False), ((4, 4, 4), True)):
        hiding = {"block": block, "ratio": [0.75, 0.75]}
        assert build(encoder, hiding=hiding).packed == packed
    with pytest.raises(ConfigError, match=r"a reach of \(2, 2, 2\).*or compute: dense"):
        build(encoder, hiding={"block": [2, 2, 2], "ratio": [0.75, 0.75]}, compute="packed")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lifted", "block", "packed"),
    [
        (False, (8, 8, 8), False),
        (False, (1, 8, 8), False),
        (True, (1, 32, 32), True),
        (True, (8, 32, 32), False),
    ],
)
def test_a_slice_is_one_block_deep_whatever_the_block(encoder, lifted, block, packed):
    """Packed where the encoder can be, and with the loss of the dense pass."""
    if lifted:
        encoder = build_encoder("lifted2d", kind="inflate", depth_from=None)
    size, losses = (1, 64, 96), []
    options = {"size": size, "hiding": {"block": block, "ratio": [0.5, 0.5]}}
    shared = copy.deepcopy(build(encoder, **options).state_dict())
    for compute in ("auto", "dense"):
        spark = build(encoder, **options, compute=compute).eval()
        spark.load_state_dict(shared)
        assert spark.packed == (packed and compute == "auto")
        losses.append(spark(one_batch(size), 0.0).loss)
    assert torch.allclose(*losses, rtol=1e-5)
    assert losses[0] > 0


def test_densify_norms_what_is_visible_and_puts_the_token_elsewhere():
    densify = Densify(1, 3)
    torch.nn.init.dirac_(densify.conv.weight)
    torch.nn.init.ones_(densify.conv.bias)
    torch.nn.init.constant_(densify.token, 7.0)
    hidden = torch.zeros(1, 4, 8, 12, dtype=torch.bool)
    hidden[:, :, :, 4:] = True
    map_ = torch.zeros(1, 1, 4, 8, 12)
    map_[:, :, ::2, :, :4] = 4.0  # half of the visible voxels: mean 2, standard deviation 2
    for passed in (DensePass(hidden, (4, 4, 4)), PackedPass(hidden, (4, 4, 4), visible=2)):
        out = densify(passed.take(map_), passed)
        assert torch.allclose(out[:, :, ::2, :, :4], torch.tensor(2.0), atol=1e-4)
        assert torch.allclose(out[:, :, 1::2, :, :4], torch.tensor(0.0), atol=1e-4)
        assert torch.equal(out[..., 4:], torch.full((1, 1, 4, 8, 8), 8.0))


def test_densify_spreads_what_is_visible_into_hidden_places(encoder):
    """3³ everywhere but at the deepest level (1³), and nothing at the finest where only coarse levels are densified."""
    assert [d.conv.kernel_size[0] for d in build(encoder).densify] == [3, 3, 3, 1]
    coarse = build(encoder, densify="coarse").densify
    assert isinstance(coarse[0].conv, torch.nn.Identity)
    assert [d.conv.kernel_size[0] for d in coarse[1:]] == [3, 3, 1]


def test_wrong_options(encoder):
    with pytest.raises(
        ConfigError, match=r"\(4, 8, 8\) is no multiple of .*\(8, 8, 8\); for example \(8, 8, 8\), \(16"
    ):
        build(encoder, hiding={"block": [4, 8, 8]})
    with pytest.raises(ConfigError, match="does not fit into size"):
        build(encoder, hiding={"block": [32, 8, 8]})
    with pytest.raises(ConfigError, match="nothing would be left to see"):
        parse(SparK.Config, {"size": [16, 16, 16], "hiding": {"block": [16, 16, 16], "ratio": [0.7, 0.7]}})
    deep = ResEnc(ResEnc.Config(features=(4, 4, 4, 4, 4, 4), blocks=(1,) * 6))
    with pytest.raises(ConfigError, match=r"deepest stride \(32, 32, 32\); for example \(32, 32, 32\)$"):
        build(deep)


def test_recomputing_is_refused_in_words(tmp_path):
    from medseg_ssl.config import ConfigError, parse
    from medseg_ssl.types import Facts
    from pretrain.run import PretrainConfig, build

    tree = {"encoder": {"name": "resenc"}, "objective": {"name": "spark", "size": [16, 16, 16]}}
    train = {"steps": 1, "recompute": True}
    with pytest.raises(ConfigError, match=r"'spark' cannot be trained with train\.recompute"):
        build(parse(PretrainConfig, {**tree, "data": {"batch_size": 2}, "train": train}), Facts())
