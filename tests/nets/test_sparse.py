"""Sparse semantics over plain encoders: nothing hidden leaks, and both ways of computing give the same numbers."""

import threading
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import checkpoint

from medseg_ssl.config import ConfigError
from medseg_ssl.nets.blocks import AveragePool, InstanceNorm, ResidualBlock
from medseg_ssl.nets.encoders.base import Encoder, EncoderConfig
from medseg_ssl.nets.encoders.resenc import ResEnc
from medseg_ssl.nets.packed import PackedPass, check_treated
from medseg_ssl.nets.sparse import DensePass
from tests.nets.test_shelf_contracts import shake
from tests.shelves import ENCODERS, build_encoder

SIZE, BLOCK = (16, 24, 32), (8, 8, 8)


class Odds(Encoder):
    """Every kind of layer that can be treated, in two levels."""

    Config = EncoderConfig
    channels, strides = (4, 8), ((1, 1, 1), (2, 4, 4))

    def __init__(self, config, channels_in=1):
        super().__init__(config, channels_in)
        self.first = nn.Conv3d(channels_in, 4, 3, padding=1)
        self.batch_norm = nn.BatchNorm3d(4)
        self.depthwise = nn.Conv3d(4, 4, (1, 5, 3), padding=(0, 2, 1), groups=4)
        self.layer_norm = nn.LayerNorm(4)
        self.wide = nn.Linear(4, 4)
        self.dilated = nn.Conv3d(4, 4, 3, padding=2, dilation=2, bias=False)
        self.scale = nn.Parameter(torch.ones(4, 1, 1, 1))
        self.pool = nn.MaxPool3d(3, stride=(1, 2, 2), padding=1)
        self.average = nn.AvgPool3d((1, 2, 2))
        self.patches = nn.Conv3d(4, 8, (2, 1, 1), stride=(2, 1, 1))
        self.group_norm = nn.GroupNorm(2, 8)
        self.instance_norm = nn.InstanceNorm3d(8)

    @property
    def stems(self):
        return ("first.weight",)

    def forward(self, image_BCDHW, spacing_mm_B3=None):
        fine = F.gelu(self.batch_norm(self.first(image_BCDHW)))
        last = self.wide(self.layer_norm(self.depthwise(fine).permute(0, 2, 3, 4, 1)))
        fine = fine + self.scale * last.permute(0, 4, 1, 2, 3)
        fine = F.dropout3d(fine - self.dilated(fine), 0.0)
        coarse = self.patches(self.average(self.pool(fine)))
        return [fine, F.relu(self.instance_norm(self.group_norm(coarse)))]


def shaken(encoder):
    torch.manual_seed(0)
    shake(encoder)
    return encoder


def tiny():
    return shaken(ResEnc(ResEnc.Config(features=(4, 6, 8, 10), blocks=(1, 1, 1, 1))))


def odds():
    return shaken(Odds(EncoderConfig()))


def draw_hidden(size, cell, *, share=0.75, batch=2, seed=0):
    """Whole cells, as many in every sample."""
    grid = [-(-n // c) for n, c in zip(size, cell, strict=True)]
    total = grid[0] * grid[1] * grid[2]
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.zeros(batch, total, dtype=torch.bool)
    for row in hidden:
        row[torch.randperm(total, generator=generator)[: round(share * total)]] = True
    hidden = hidden.reshape(batch, *grid)
    for axis, width in enumerate(cell, start=1):
        hidden = hidden.repeat_interleave(width, dim=axis)
    return hidden[:, : size[0], : size[1], : size[2]], total - round(share * total)


def passes(size=SIZE, block=BLOCK, cell=BLOCK, **options):
    hidden_BDHW, visible = draw_hidden(size, block, **options)
    return hidden_BDHW, DensePass(hidden_BDHW, cell), PackedPass(hidden_BDHW, block, visible=visible)


def image_of(size=SIZE, *, batch=2, seed=1):
    return torch.randn(batch, 1, *size, generator=torch.Generator().manual_seed(seed)) + 1.0


def spread(passed, encoder, image):
    return [passed.spread(m) for m in passed.encode(encoder, image)]


# -- nothing leaks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [SIZE, (17, 25, 30), (1, 40, 33)], ids=str)
def test_hidden_voxels_never_leak_whatever_stands_there(size):
    hidden_BDHW, _ = draw_hidden(size, BLOCK)
    encoder, image = tiny(), image_of(size)
    before = DensePass(hidden_BDHW, BLOCK).encode(encoder, image)
    for value in (99.0, float("nan")):
        changed = image.masked_fill(hidden_BDHW[:, None], value)
        after = DensePass(hidden_BDHW, BLOCK).encode(encoder, changed)
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert before[0].abs().sum() > 0
    changed = image.masked_fill(~hidden_BDHW[:, None], 99.0)
    after = DensePass(hidden_BDHW, BLOCK).encode(encoder, changed)
    assert not torch.allclose(before[-1], after[-1])


@pytest.mark.parametrize("make", [tiny, odds])
def test_hidden_places_hold_zeros_at_every_level(make):
    hidden_BDHW, dense, packed = passes()
    encoder, image = make(), image_of()
    for maps in (dense.encode(encoder, image), spread(packed, encoder, image)):
        for map_, stride in zip(maps, encoder.strides, strict=True):
            hidden = hidden_BDHW[:, None, :: stride[0], :: stride[1], :: stride[2]].expand_as(map_)
            assert (map_[hidden] == 0).all()
            assert (map_[~hidden] != 0).float().mean() > 0.4


def test_visible_voxels_see_their_visible_neighbours():
    """Blocks are not islands: what changes in one reaches the next, and no further than the kernels do."""
    hidden_BDHW = torch.ones(1, *SIZE, dtype=torch.bool)
    hidden_BDHW[:, :8, :8, :16] = False  # two neighbours along W
    hidden_BDHW[:, 8:, 16:, 24:] = False  # and one far away
    conv = nn.Conv3d(1, 1, 3, padding=1)
    image = image_of(batch=1)
    changed = image.clone()
    changed[..., 0, 0, 8] += 1.0  # first voxel of the second block
    for passed in (DensePass(hidden_BDHW, BLOCK), PackedPass(hidden_BDHW, BLOCK, visible=3)):
        taken = [passed.take(i) for i in (image, changed)]
        with passed:
            maps = [conv(t) for t in taken]
        differs = (passed.spread(maps[1]) != passed.spread(maps[0]))[0, 0].nonzero().tolist()
        assert differs == [[d, h, w] for d in (0, 1) for h in (0, 1) for w in (7, 8, 9)]


# -- known answers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "size"), [(tiny, SIZE), (tiny, (17, 25, 30)), (odds, SIZE)])
def test_with_nothing_hidden_it_is_the_plain_encoder(make, size):
    encoder, image = make(), image_of(size)
    plain = encoder(image)
    maps = DensePass(torch.zeros(2, *size, dtype=torch.bool), BLOCK).encode(encoder, image)
    for a, b in zip(maps, plain, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    if size == SIZE:
        whole = PackedPass(torch.zeros(2, *size, dtype=torch.bool), BLOCK, visible=24)
        for a, b in zip(spread(whole, encoder, image), plain, strict=True):
            assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    ("norm", "over"),
    [
        (InstanceNorm(4), "instance"),
        (nn.InstanceNorm3d(4, affine=True), "instance"),
        (nn.GroupNorm(2, 4), "group"),
        (nn.BatchNorm3d(4), "batch"),
    ],
)
def test_norms_take_their_statistics_over_visible_voxels(norm, over):
    hidden_BDHW, dense, _ = passes()
    shake(norm)
    map_ = torch.randn(2, 4, *SIZE).mul(3).add(50).masked_fill(hidden_BDHW[:, None], 0.0).requires_grad_()
    with dense:
        out = norm(map_)
    expected = torch.zeros_like(out)
    groups = {"instance": [[0], [1], [2], [3]], "group": [[0, 1], [2, 3]], "batch": [[0], [1], [2], [3]]}[
        over
    ]
    for samples in ([0, 1],) if over == "batch" else ([0], [1]):
        for group in groups:
            chosen = torch.zeros_like(map_, dtype=torch.bool)
            for b in samples:
                chosen[b, group] = ~hidden_BDHW[b]
            values = map_[chosen]
            normed = (values - values.mean()) / (values.var(correction=0) + norm.eps).sqrt()
            expected = expected.masked_scatter(chosen, normed)
    affine = expected * norm.weight[:, None, None, None] + norm.bias[:, None, None, None]
    expected = affine.masked_fill(hidden_BDHW[:, None], 0.0)
    assert torch.allclose(out, expected, atol=1e-5)
    weights = torch.randn(out.shape)
    wanted = torch.autograd.grad((expected * weights).sum(), [map_, norm.weight, norm.bias])
    got = torch.autograd.grad((out * weights).sum(), [map_, norm.weight, norm.bias])
    visible = (~hidden_BDHW[:, None]).float()
    assert torch.allclose(got[0] * visible, wanted[0] * visible, atol=1e-4)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-3) for a, b in zip(got[1:], wanted[1:], strict=True))


def test_running_statistics_of_a_batch_norm_are_those_of_visible_voxels():
    hidden_BDHW, dense, packed = passes()
    image = image_of().expand(-1, 4, -1, -1, -1)
    values = image[:, 0][~hidden_BDHW]
    for passed in (dense, packed):
        norm, taken = nn.BatchNorm3d(4), passed.take(image)
        with passed:
            norm(taken)
        assert torch.allclose(norm.running_mean, 0.1 * values.mean().expand(4), atol=1e-5)
        assert torch.allclose(norm.running_var, 0.9 + 0.1 * values.var().expand(4), atol=1e-5)


def test_pools_see_visible_voxels_only():
    hidden_BDHW = torch.zeros(1, 4, 4, 8, dtype=torch.bool)
    hidden_BDHW[..., 4:] = True
    image = torch.full((1, 1, 4, 4, 8), -2.0)
    for passed in (DensePass(hidden_BDHW, (4, 4, 4)), PackedPass(hidden_BDHW, (4, 4, 4), visible=1)):
        taken = passed.take(image)
        with passed:
            most, mean = nn.MaxPool3d(3, 2, 1)(taken), AveragePool((2, 2, 2))(taken)
        for map_ in (passed.spread(most), passed.spread(mean)):
            assert (map_[..., :2] == -2.0).all(), "zeros of hidden neighbours do not count"
            assert (map_[..., 2:] == 0.0).all()
    passed = DensePass(hidden_BDHW, (4, 4, 4))
    taken = passed.take(image)
    with passed:
        mean = nn.AvgPool3d(3, 1, 1, count_include_pad=False)(taken)
    assert torch.allclose(mean[..., :4], image[..., :4])
    assert (mean[..., 4:] == 0.0).all()


def test_a_level_coarser_than_the_cells_is_visible_where_any_cell_is():
    hidden_BDHW = torch.ones(1, 8, 8, 8, dtype=torch.bool)
    hidden_BDHW[:, :2, :2, 2:4] = False
    passed = DensePass(hidden_BDHW, (2, 2, 2))
    pool, taken = nn.MaxPool3d(2), passed.take(torch.ones(1, 1, 8, 8, 8))
    with passed:
        once = pool(taken)
        twice = pool(once)
    assert once.nonzero().tolist() == [[0, 0, 0, 0, 1]]
    assert twice.nonzero().tolist() == [[0, 0, 0, 0, 0]]


# -- packed and dense ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "block", "cell"),
    [(tiny, (8, 8, 8), (8, 8, 8)), (tiny, (8, 8, 16), (8, 8, 8)), (odds, (4, 8, 8), (4, 8, 8))],
)
def test_packed_equals_dense_with_its_gradients(make, block, cell):
    """Through faces, edges and corners of blocks: at 40 % hidden most have neighbours."""
    _, dense, packed = passes(block=block, cell=cell, share=0.4)
    encoder, image = make(), image_of()
    tokens = [torch.randn(c) for c in encoder.channels]
    found = []
    for passed in (dense, packed):
        encoder.zero_grad()
        maps = passed.encode(encoder, image)
        maps = [passed.spread(m, t) for m, t in zip(maps, tokens, strict=True)]
        generator = torch.Generator().manual_seed(0)
        sum((m * torch.randn(m.shape, generator=generator)).sum() for m in maps).backward()
        found.append((maps, {n: p.grad for n, p in encoder.named_parameters()}))
    for a, b in zip(found[0][0], found[1][0], strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    largest = max(gradient.abs().max().item() for gradient in found[0][1].values())
    for name, gradient in found[0][1].items():  # those of biases before a norm are rounding alone
        assert torch.allclose(gradient, found[1][1][name], rtol=1e-4, atol=1e-5 * largest), name


@pytest.mark.parametrize(
    ("size", "block", "depth_from"),
    [
        ((1, 64, 64), (1, 32, 32), None),  # slices: every map is one slice deep
        ((32, 64, 64), (32, 32, 32), 1),  # one block deep: the deepest map is
        ((64, 32, 32), (32, 32, 32), 1),  # two blocks deep, and one visible: none is
        ((2, 64, 32), (1, 64, 32), None),
    ],
    ids=str,
)
def test_packed_kernels_meet_as_many_slices_as_dense_ones(size, block, depth_from):
    """A lifted kernel is summed where a crop's map is a single slice, not where that of a block is."""
    encoder = shaken(build_encoder("lifted2d", kind="inflate", depth_from=depth_from)).eval()
    _, dense, packed = passes(size, block, block, share=0.5)
    image = image_of(size)
    for a, b in zip(dense.encode(encoder, image), spread(packed, encoder, image), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_taken_blocks_go_back_to_their_places():
    hidden_BDHW, _, packed = passes()
    image = image_of()
    assert packed.take(image).shape == (2, 1, 6 * 8, 8, 8), "a quarter of 24 blocks"
    assert torch.equal(packed.spread(packed.take(image)), image.masked_fill(hidden_BDHW[:, None], 0.0))
    token = packed.spread(packed.take(image), torch.tensor([7.0]))
    assert torch.equal(token, image.masked_fill(hidden_BDHW[:, None], 7.0))


def test_blocks_that_do_not_divide_the_crop_cannot_be_packed():
    with pytest.raises(ValueError, match="do not divide a crop of"):
        PackedPass(torch.zeros(1, 12, 16, 16, dtype=torch.bool), (8, 8, 8), visible=4)


# -- the encoder stays the plain one ---------------------------------------------------------------------------------


def test_the_encoder_is_the_plain_one_after_a_call_and_after_an_error():
    encoder, image = tiny(), image_of()
    plain = encoder(image)
    hidden_BDHW, dense, packed = passes()
    dense.encode(encoder, image)
    packed.encode(encoder, image)

    def fails(*_):
        raise RuntimeError("in the middle of a level")

    hook = encoder.stages[1].register_forward_hook(fails)
    for passed in passes()[1:]:
        with pytest.raises(RuntimeError, match="in the middle"):
            passed.encode(encoder, image)
    hook.remove()
    assert all(torch.equal(a, b) for a, b in zip(encoder(image), plain, strict=True))
    assert hidden_BDHW.any()


def test_calls_side_by_side_do_not_disturb_one_another():
    """Two threads run one encoder in step, each with hidden places of its own, and a third without any."""
    encoder, image = tiny(), image_of()
    first, second = draw_hidden(SIZE, BLOCK, seed=1), draw_hidden(SIZE, BLOCK, seed=2)
    ways = {
        "dense": lambda: DensePass(first[0], BLOCK).encode(encoder, image),
        "packed": lambda: PackedPass(second[0], BLOCK, visible=second[1]).encode(encoder, image),
        "plain": lambda: encoder(image),
    }
    alone = {name: way() for name, way in ways.items()}
    together, barrier = {}, threading.Barrier(len(ways))

    def in_step(*_):
        barrier.wait(20)

    hooks = [stage.register_forward_pre_hook(in_step) for stage in encoder.stages]
    threads = [
        threading.Thread(target=lambda name=name, way=way: together.update({name: way()}))
        for name, way in ways.items()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for hook in hooks:
        hook.remove()
    for name in ways:
        assert all(torch.equal(a, b) for a, b in zip(alone[name], together[name], strict=True)), name


@pytest.mark.parametrize("number", [1, 2])
def test_a_recomputed_part_enters_the_pass_again(number):
    """Without it, checkpointing does not go wrong in silence: torch finds other tensors than it saved."""
    block, image = ResidualBlock(1, 4, kernel=(3, 3, 3)), image_of()
    shake(block)

    def gradient(how):
        passed = passes()[number]
        taken = passed.take(image)
        block.zero_grad()
        with passed:
            out = how(taken, passed)
        out.square().sum().backward()
        return block.conv1.conv.weight.grad.clone()

    def recomputed(image, passed):
        return checkpoint.checkpoint(
            block, image, use_reentrant=False, context_fn=lambda: (nullcontext(), passed)
        )

    assert torch.equal(gradient(lambda i, _: block(i)), gradient(recomputed))
    with pytest.raises(checkpoint.CheckpointError):
        gradient(lambda i, _: checkpoint.checkpoint(block, i, use_reentrant=False))


# -- what cannot be treated ------------------------------------------------------------------------------------------


class Refused(Encoder):
    """Calls one function in its forward pass."""

    Config = EncoderConfig
    channels, strides = (1, 1), ((1, 1, 1), (2, 2, 2))
    stems = ()

    def __init__(self, function):
        super().__init__(EncoderConfig())
        self.function = function

    def forward(self, image_BCDHW, spacing_mm_B3=None):
        return [image_BCDHW, self.function(image_BCDHW)]


@pytest.mark.parametrize(
    ("function", "named"),
    [
        (lambda x: F.scaled_dot_product_attention(x, x, x), "scaled_dot_product_attention"),
        (lambda x: x.flatten(2).transpose(1, 2), "flatten"),
        (lambda x: F.interpolate(x, scale_factor=2), "interpolate"),
        (lambda x: x - x.mean(dim=(2, 3, 4), keepdim=True), "mean"),
        (lambda x: x + 1.0, "add"),
        (lambda x: torch.roll(x, 1, dims=2), "roll"),
        (lambda x: F.conv_transpose3d(x, torch.ones(1, 1, 2, 2, 2), stride=2), "conv_transpose3d"),
        (lambda x: F.conv3d(x, torch.ones(1, 1, 3, 3, 3)), "pad"),
        (lambda x: torch.cat([x, x[:, :1]], 1), "__getitem__"),
    ],
)
@pytest.mark.parametrize("packed", [{}, {"size": (4, 4, 4), "block": (2, 2, 2), "visible": 4}])
def test_other_functions_are_refused_by_name(function, named, packed):
    with pytest.raises(ConfigError, match=f"cannot treat .*{named}.*no attention"):
        check_treated(Refused(function), **packed)


def test_a_packed_pass_is_tried_on_the_blocks_of_the_training():
    """A kernel may reach further than a block of the deepest stride is wide; a slice stays one block deep."""
    wide = ResEnc(ResEnc.Config(features=(4, 6), blocks=(1, 2), kernels=((3, 3, 3), (5, 5, 5))))
    check_treated(wide, size=(8, 8, 8), block=(4, 4, 4), visible=2)
    with pytest.raises(ConfigError, match=r"a reach of \(2, 2, 2\) voxels beyond blocks of \(1, 1, 1\)"):
        check_treated(wide, size=(8, 8, 8), block=(2, 2, 2), visible=16)
    slices = build_encoder("lifted2d", kind="inflate", depth_from=None)
    check_treated(slices, size=(1, 64, 64), block=(1, 32, 32), visible=2)


def test_batch_norm_over_processes_is_refused_where_it_cannot_be_treated():
    encoder = nn.SyncBatchNorm.convert_sync_batchnorm(odds())
    with pytest.raises(ConfigError, match="batch norm over several processes"):
        passes()[1].encode(encoder, image_of())


@pytest.mark.parametrize("name", ENCODERS)
def test_every_encoder_on_the_shelf_is_treated_rightly_or_refused(name):
    encoder = build_encoder(name)
    cell = encoder.strides[-1]
    size = (2 * cell[0], 2 * cell[1], 2 * cell[2])
    try:
        check_treated(encoder, size=size, block=cell, visible=4)
    except ConfigError:
        with pytest.raises(ConfigError, match="cannot treat"):
            check_treated(encoder)
        return
    shake(encoder)
    hidden_BDHW, dense, packed = passes(size, cell, cell, share=0.5)
    image = image_of(size)
    for passed in (dense, packed):
        maps = passed.encode(encoder, image)
        again = type(passed).encode(passed, encoder, image.masked_fill(hidden_BDHW[:, None], 9.0))
        assert all(torch.equal(a, b) for a, b in zip(maps, again, strict=True))
    for a, b in zip(dense.encode(encoder, image), spread(packed, encoder, image), strict=True):
        assert torch.allclose(a, b, atol=1e-4)
    nothing = DensePass(torch.zeros_like(hidden_BDHW), cell)
    for a, b in zip(nothing.encode(encoder, image), encoder(image), strict=True):
        assert torch.allclose(a, b, atol=1e-4)
