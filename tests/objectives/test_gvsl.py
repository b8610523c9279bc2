import pytest
import torch

from medseg_ssl.config import ConfigError, parse
from medseg_ssl.nets.warping import own_places
from medseg_ssl.objectives.gvsl import GVSL, pairs
from medseg_ssl.types import Facts
from tests.objectives.conftest import make_batch, make_view

SIZE = (16, 20, 24)


def build(encoder, **options):
    config = parse(GVSL.Config, {"size": SIZE, "hiding": {"block": [4, 4, 8]}, **options})
    torch.manual_seed(1)
    return GVSL(config, encoder, Facts())


def smooth_view(batch=4, *, seed=0):
    view = make_view(SIZE, batch=batch, seed=seed)
    view.image_BCDHW = torch.nn.functional.avg_pool3d(view.image_BCDHW, 5, 1, 2) * 8
    return view


def one_batch(batch=4, *, subjects=None, **kwargs):
    made = make_batch({"crop": [smooth_view(batch, **kwargs)]})
    made.subject_B = subjects or made.subject_B
    return made


def part(batch, first, last):
    """Samples of a batch as another process would get them."""
    view = batch.views["crop"][0]
    cut = {k: v[first:last] for k, v in vars(view).items() if v is not None}
    made = make_batch({"crop": [type(view)(**cut)]}, first=first)
    made.subject_B = batch.subject_B[first:last]
    return made


def test_partners_are_neighbours_of_one_modality_and_two_subjects():
    batch = one_batch(7, subjects=["a", "b", "c", "c", "d", "e", "f"])
    assert pairs(batch) == ([0, 1, 4, 5], [1, 0, 5, 4])
    batch.views["crop"][0].modality_B = ["CT", "MR", "CT", "CT", "PT", "PT", "CT"]
    assert pairs(batch) == ([4, 5], [5, 4])


def test_the_first_field_is_the_identity(encoder):
    """So the first unlikeness is that of the crops as they are."""
    gvsl = build(encoder)
    batch = one_batch()
    view = batch.views["crop"][0]
    for side in (0, 2):  # equal crops of different subjects
        view.image_BCDHW[side + 1] = 1.5 * view.image_BCDHW[side] + 0.2
    logs = gvsl(batch, 0.0).logs
    assert logs["unlikeness"] < 0.02
    assert logs["roughness"] == 0
    assert logs["paired_share"] == 1


def test_gradients_reach_both_heads(encoder):
    """A peer's affine head had none."""
    gvsl = build(encoder)
    gvsl(one_batch(), 0.0).loss.backward()
    for head in (gvsl.affine_head.numbers, gvsl.flow_head.flow):
        assert head.weight.grad is not None
        assert head.weight.grad.abs().max() > 0
    gvsl.zero_grad()
    with torch.no_grad():
        for head in (gvsl.affine_head.numbers, gvsl.flow_head.flow):
            head.weight += 0.01 * torch.randn_like(head.weight)
    loss = gvsl(one_batch(), 0.0)
    loss.loss.backward()
    assert loss.logs["roughness"] > 0
    for name, parameter in gvsl.named_parameters():
        if parameter.requires_grad and "head" in name:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name


def test_the_deepest_features_learn_from_the_affine_map_alone(encoder):
    gvsl = build(encoder, restoration_weight=0.0)
    with torch.no_grad():
        gvsl.affine_head.numbers.weight += 0.01 * torch.randn_like(gvsl.affine_head.numbers.weight)
    gvsl.flow_head.requires_grad_(False)  # its weights are 0, so nothing passes through it
    gvsl(one_batch(), 0.0).loss.backward()
    gradient = encoder.stages[-1][0].skip[1].conv.weight.grad
    assert gradient is not None
    assert gradient.abs().max() > 0
    assert all(p.grad is None or not p.grad.any() for p in gvsl.decoder.parameters())


def test_a_batch_shared_among_processes_has_the_same_loss(encoder):
    gvsl = build(encoder).eval()
    batch = one_batch(6, subjects=["a", "b", "c", "c", "d", "e"])
    whole = gvsl(batch, 0.0).loss
    halves = [gvsl(part(batch, *span), 0.0).loss for span in ((0, 2), (2, 6))]
    assert torch.allclose((2 * halves[0] + 4 * halves[1]) / 6, whole, atol=1e-5)


def test_without_a_partner_the_restoration_remains(encoder):
    gvsl = build(encoder).eval()
    batch = one_batch(1)
    alone = gvsl(batch, 0.0)
    assert "unlikeness" not in alone.logs
    assert torch.equal(alone.loss.detach(), alone.logs["restoration"])
    together = part(one_batch(2), 0, 2)
    together.subject_B = ["s0", "s0"]
    assert gvsl(together, 0.0).logs["paired_share"] == 0


def test_a_shift_is_found_both_ways(encoder):
    """The second crop is the first one moved by three voxels along W."""
    gvsl = build(encoder, hiding={"block": [4, 4, 4], "ratio": [0.01, 0.02]}, restoration_weight=0.0)
    batch = one_batch(2)
    view = batch.views["crop"][0]
    view.image_BCDHW[1] = view.image_BCDHW[0].roll(3, dims=-1)
    optimizer = torch.optim.AdamW(gvsl.parameters(), lr=1e-3)
    for _ in range(14):
        optimizer.zero_grad()
        output = gvsl(batch, 0.0)
        output.loss.backward()
        optimizer.step()
    assert output.logs["unlikeness"] < 0.2
    there, back = torch.tensor([0, 1]), torch.tensor([1, 0])
    with torch.no_grad():
        maps, finest, _, _ = gvsl._see(batch)
        place_P3DHW, _ = gvsl._place(view, maps[-1], finest, there, back)
    moved = (place_P3DHW - own_places(SIZE)).mean((2, 3, 4))
    assert torch.allclose(moved, torch.tensor([[0.0, 0.0, 3.0], [0.0, 0.0, -3.0]]), atol=0.7)


def test_voxels_without_data_enter_no_window(encoder):
    """Of one crop of the pair alone, as the fixed and as the moving one."""
    gvsl = build(encoder, restoration_weight=0.0).eval()
    batch = one_batch(2)
    view = batch.views["crop"][0]
    view.clean_BCDHW = view.image_BCDHW.clone()
    view.foreground_BDHW[0, :, 12:] = False
    view.valid_BDHW[0, :, 12:] = False
    before = gvsl(batch, 0.0).loss
    view.clean_BCDHW[0, :, :, 12:] = 5.0
    assert torch.allclose(gvsl(batch, 0.0).loss, before, atol=1e-4)
    view.clean_BCDHW[0, :, :, :6] = torch.randn(1, 16, 6, 24)
    assert not torch.allclose(gvsl(batch, 0.0).loss, before, atol=1e-3)


def test_windows_around_body_alone_count(encoder):
    gvsl = build(encoder, restoration_weight=0.0).eval()
    batch = one_batch(2)
    view = batch.views["crop"][0]
    view.clean_BCDHW = view.image_BCDHW.clone()
    view.foreground_BDHW[:, :, 10:] = False
    before = gvsl(batch, 0.0).loss
    view.clean_BCDHW[:, :, :, 14:] = torch.randn(2, 1, 16, 6, 24)  # windows of 9 around body end at 13
    assert torch.allclose(gvsl(batch, 0.0).loss, before, atol=1e-4)
    view.clean_BCDHW[:, :, :, 13:14] = torch.randn(2, 1, 16, 1, 24)
    assert not torch.allclose(gvsl(batch, 0.0).loss, before, atol=1e-4)


def test_wrong_options():
    with pytest.raises(ConfigError, match="window must be odd"):
        parse(GVSL.Config, {"window": 8})
    with pytest.raises(ConfigError, match="does not fit into size"):
        parse(GVSL.Config, {"size": [8, 8, 8], "hiding": {"block": [16, 4, 4]}})


def test_to_move_everything_out_of_the_partner_is_the_worst_answer(encoder):
    objective = build(encoder)
    batch = one_batch(2)
    view = batch.views["crop"][0]
    counted = objective.config.restoration.counted(view)
    a, b = torch.tensor([0, 1]), torch.tensor([1, 0])
    own = own_places(view.image_BCDHW.shape[2:], view.image_BCDHW.device)
    at_home = objective._unlikeness(view, counted, a, b, own.expand(2, -1, -1, -1, -1))
    away = objective._unlikeness(view, counted, a, b, own.expand(2, -1, -1, -1, -1) + 1000.0)
    assert (away == 1.0).all()
    assert (at_home < 1.0).all()
