import pytest
import torch

from medseg_ssl.config import ConfigError, parse
from medseg_ssl.nets.encoders.primus import Primus
from medseg_ssl.nets.hiding import draw_hidden
from medseg_ssl.nets.tokens import grid_of, tokens_marked, voxels_marked
from medseg_ssl.objectives.mae_tokens import MAETokens, unseen_count
from medseg_ssl.types import Facts
from tests.objectives.conftest import make_batch, make_view

SIZE = (16, 24, 40)
PATCH = (4, 8, 8)
SMALL = {"embed_dim": 48, "depth": 2, "heads": 2, "patch": PATCH, "spacing_mm": (3.0, 2.0, 1.0)}


def build(size=SIZE, *, channels=1, **options) -> MAETokens:
    torch.manual_seed(0)
    encoder = Primus(parse(Primus.Config, SMALL), channels)
    config = parse(MAETokens.Config, {"size": size, "decoder_dim": 48, "decoder_heads": 2, **options})
    return MAETokens(config, encoder, Facts()).eval()


def one_batch(size=SIZE, **options):
    batch = make_batch({"crop": [make_view(size, **options)]})
    view = batch.views["crop"][0]
    view.clean_BCDHW = view.image_BCDHW.clone()
    return batch


def one_token(hidden_BDHW, *, which: bool):
    """Voxels of a single token of sample 1, a hidden or a visible one."""
    marked_BL = tokens_marked(hidden_BDHW, PATCH)
    chosen = torch.zeros_like(marked_BL)
    chosen[1, (marked_BL[1] == which).nonzero()[2]] = True
    return voxels_marked(chosen, hidden_BDHW.shape[1:], PATCH)


@pytest.mark.parametrize("size", [SIZE, (13, 25, 30)], ids=str)
def test_loss_looks_at_hidden_tokens_and_at_nothing_else(size):
    """A peer flattened tokens in one order and its loss region in another (on sides that differ)."""
    objective, batch = build(size), one_batch(size)
    view = batch.views["crop"][0]
    hidden, _ = objective.choose(batch)
    with torch.no_grad():
        before = objective(batch, 0.0).loss
        for which in (True, False):
            changed = one_batch(size)
            changed.views["crop"][0].clean_BCDHW[one_token(hidden, which=which)[:, None]] += 1.0
            assert torch.equal(objective(changed, 0.0).loss, before) == (not which)
        view.clean_BCDHW[~hidden[:, None]] += 1.0
        assert torch.equal(objective(batch, 0.0).loss, before)


@pytest.mark.parametrize("size", [SIZE, (13, 25, 30)], ids=str)
def test_input_of_hidden_tokens_is_never_seen_and_that_of_each_visible_one_is(size):
    objective, batch = build(size), one_batch(size)
    view = batch.views["crop"][0]
    hidden, keep = objective.choose(batch)
    with torch.no_grad():
        before, _ = objective.restore(view, keep)
        view.image_BCDHW = view.image_BCDHW.masked_fill(hidden[:, None], 99.0)
        after, _ = objective.restore(view, keep)
        assert torch.equal(before, after)
        view.image_BCDHW = view.image_BCDHW + one_token(hidden, which=False)[:, None]
        after, _ = objective.restore(view, keep)
    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[1], after[1])


class Places(torch.nn.Module):
    """Stands for the decoder: a token's output is its place."""

    def forward(self, tokens_BKE, positions_BK3):
        return torch.nn.functional.pad(positions_BK3, (0, tokens_BKE.shape[-1] - 3))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_what_the_decoder_says_of_a_place_lands_there(axis):
    objective, batch = build((13, 25, 30)), one_batch((13, 25, 30))
    hidden, keep = objective.choose(batch)
    objective.decoder = Places()
    with torch.no_grad():
        objective.head.weight.zero_()[:, axis] = 1.0
        objective.head.bias.zero_().add_(1.0)
        restored, _ = objective.restore(batch.views["crop"][0], keep)
    index = torch.arange(hidden.shape[axis + 1]) // PATCH[axis] + 1.0
    expected = index.reshape([-1 if a == axis else 1 for a in range(3)]) * hidden
    assert torch.allclose(restored[:, 0], expected)


def test_the_encoder_works_on_visible_tokens_alone():
    objective, batch = build(), one_batch()
    lengths = []
    for block in (*objective.encoder.transformer.blocks, *objective.decoder.blocks):
        block.register_forward_pre_hook(lambda _, given: lengths.append(given[0].shape[1]))
    output = objective(batch, 0.0)
    assert lengths == [16, 16, 60, 60]  # 30 blocks of two tokens, of which 22 are hidden
    assert output.features_BE.shape == (2, 48)


@pytest.mark.parametrize("strategy", ["blocks", "tubes"])
def test_hidden_are_whole_patches_as_many_in_each_sample_and_the_samples_own(strategy):
    objective = build(hiding={"strategy": strategy, "block": [4, 8, 8], "ratio": [0.6, 0.6]})
    a, b = (make_batch({"crop": [make_view(SIZE, seed=s)]}, first=6 + s) for s in (0, 1))
    hidden, _ = objective.choose(a)
    tokens_BL = tokens_marked(hidden, PATCH)
    assert torch.equal(voxels_marked(tokens_BL, SIZE, PATCH), hidden)
    assert tokens_BL.sum(1).tolist() == [unseen_count(objective.config.hiding, SIZE, PATCH)] * 2
    assert torch.equal(hidden[1], objective.choose(b)[0][0])
    assert not torch.equal(hidden[0], hidden[1])
    if strategy == "tubes":
        assert torch.equal(hidden, hidden[:, :1].expand_as(hidden))


RAGGED = {
    "foreground": {"strategy": "foreground", "block": [4, 8, 8]},
    "millimetres": {"block_mm": [12.0, 16.0, 20.0]},
    "tubes in millimetres": {"strategy": "tubes", "block_mm": [3.0, 16.0, 8.0]},
    "foreground in millimetres": {"strategy": "foreground", "block_mm": [24.0, 16.0, 16.0]},
}


@pytest.mark.parametrize("hiding", RAGGED.values(), ids=RAGGED)
def test_samples_that_hide_unequal_numbers_are_seen_in_equal_ones(hiding):
    """The first sample's body fills the first half of its slices, the second's is one voxel."""
    objective = build(hiding={**hiding, "ratio": [0.75, 0.75]})
    batch = one_batch()
    view = batch.views["crop"][0]
    view.foreground_BDHW[0] = torch.arange(SIZE[0])[:, None, None] < SIZE[0] // 2
    view.foreground_BDHW[1] = False
    view.foreground_BDHW[1, 7, 3, 30] = True
    drawn = draw_hidden(objective.config.hiding, batch, view, purpose="mae_tokens/hidden", unit=PATCH)
    hidden, keep = objective.choose(batch)
    assert keep.shape == (2, 15), "a quarter of 60 tokens"
    hidden_BL, body_BL = tokens_marked(hidden, PATCH), tokens_marked(view.foreground_BDHW, PATCH, least=0.0)
    assert torch.equal(voxels_marked(hidden_BL, SIZE, PATCH), hidden)
    assert not (hidden & ~drawn).any(), "only what the strategy drew is hidden"
    assert not hidden_BL.gather(1, keep).any(), "nothing hidden is seen"
    shown = tokens_marked(drawn & ~hidden, PATCH).sum(1)
    seen = torch.zeros_like(hidden_BL).scatter(1, keep, value=True)
    for sample in range(2):
        visible = ~tokens_marked(drawn, PATCH)[sample]
        if visible.sum() >= 15:
            assert shown[sample] == 0
            left = visible & ~seen[sample]
            assert not (left & body_BL[sample]).any() or not (seen[sample] & ~body_BL[sample]).any(), (
                "air goes first"
            )
        else:
            assert shown[sample] == 15 - visible.sum()
    with torch.no_grad():
        before, _ = objective.restore(view, keep)
        view.image_BCDHW = view.image_BCDHW.masked_fill(~voxels_marked(seen, SIZE, PATCH)[:, None], 99.0)
        after, _ = objective.restore(view, keep)
    assert torch.equal(before, after)
    again, kept = objective.choose(batch)
    assert torch.equal(again, hidden)
    assert torch.equal(kept, keep)
    assert objective(batch, 0.0).loss.isfinite()


def test_normalised_targets_do_not_know_brightness_or_contrast_of_a_patch():
    plain, normed = build(channels=2), build(channels=2, norm_patches=True)
    batch, other = one_batch(channels=2), one_batch(channels=2)
    for each in (batch, other):
        view = each.views["crop"][0]
        view.clean_BCDHW *= 0.3
        view.valid_BDHW[:, :, :3] = False
    hidden, _ = plain.choose(batch)
    one = one_token(hidden, which=True)[:, None].expand(-1, 2, -1, -1, -1).clone()
    one[:, 0] = False  # channel 1 alone
    view = other.views["crop"][0]
    view.clean_BCDHW[one] = view.clean_BCDHW[one] * 1.7 + 0.4
    with torch.no_grad():
        assert not torch.allclose(plain(batch, 0.0).loss, plain(other, 0.0).loss)
        assert torch.allclose(normed(batch, 0.0).loss, normed(other, 0.0).loss, atol=1e-4)
        mean, std = normed._patch_statistics(view)
    counted = view.valid_BDHW[0, :4, 8:16, :8].bool()
    patch = view.clean_BCDHW[0, 1, :4, 8:16, :8][counted]
    assert torch.allclose(mean[0, 1, 0, 8, 0], patch.mean(), atol=1e-5)
    assert torch.allclose(std[0, 1, 0, 8, 0], patch.std(correction=0), atol=1e-4)


def test_restoring_a_ramp_is_learned():
    objective = build().train()
    batch = one_batch()
    view = batch.views["crop"][0]
    view.image_BCDHW = torch.linspace(-1, 1, SIZE[2]).expand(2, 1, *SIZE)
    view.clean_BCDHW = None
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = objective(batch, 0.0).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_preview_shows_the_restoration_in_hidden_voxels_only():
    objective, batch = build(norm_patches=True), one_batch()
    with torch.no_grad():
        shown = objective.preview(batch)
    hidden, _ = objective.choose(batch)
    assert torch.equal(shown["restored"][~hidden], shown["target"][~hidden])
    assert not torch.equal(shown["restored"][hidden], shown["target"][hidden])


def test_it_ships_the_encoder_alone():
    objective = build()
    assert objective.export() == (objective.encoder, None, None, ("levels.",))


@pytest.mark.parametrize("depth", [1, 8, 32])
def test_a_slice_is_one_patch_deep_whatever_the_block(depth):
    objective = build((1, 16, 24), hiding={"block": [depth, 8, 8], "ratio": [0.5, 0.5]})
    hidden, keep_BK = objective.choose(one_batch((1, 16, 24)))
    assert (hidden.flatten(1).float().mean(1) == 0.5).all()
    assert keep_BK.shape[1] == grid_of((1, 16, 24), PATCH)[1] * grid_of((1, 16, 24), PATCH)[2] // 2


def test_wrong_options():
    def options(**hiding):
        return parse(MAETokens.Config, {"hiding": {"ratio": [0.75, 0.75], **hiding}})

    with pytest.raises(ConfigError, match="one share given twice"):
        options(ratio=[0.6, 0.75])
    with pytest.raises(ConfigError, match="is a single patch"):
        build((4, 8, 8), hiding={"strategy": "foreground", "block": [4, 8, 1], "ratio": [0.75, 0.75]})
    with pytest.raises(ConfigError, match="does not fit into size"):
        options(block=[8, 8, 128])
    with pytest.raises(ConfigError, match=r"token length 50 must be heads \(4\)"):
        parse(MAETokens.Config, {"decoder_dim": 50})
    with pytest.raises(
        ConfigError, match=r"\(1, 2, 1\) patches, which do not divide the \(4, 3, 5\) patches"
    ):
        build(hiding={"block": [4, 16, 8], "ratio": [0.75, 0.75]})
    with pytest.raises(ConfigError, match="nothing would be left to see"):
        build((4, 8, 8), hiding={"block": [4, 8, 8], "ratio": [0.75, 0.75]})
    assert grid_of(SIZE, PATCH) == (4, 3, 5)
