"""On a crop of 2 x 3 x 4 patches, whose patches and voxels have three different sides."""

import pytest
import torch

from medseg_ssl.config import ConfigError, UserError, parse
from medseg_ssl.nets.encoders.primus import Primus
from medseg_ssl.nets.tokens import as_tokens, voxels_marked
from medseg_ssl.objectives.jepa import JEPA
from medseg_ssl.types import Facts
from tests.objectives.conftest import make_batch, make_view

PATCH, SIZE, GRID = (8, 4, 6), (16, 12, 24), (2, 3, 4)
COUNT = 24


@pytest.fixture
def token_encoder():
    torch.manual_seed(0)
    options = {"embed_dim": 48, "depth": 2, "heads": 2, "patch": PATCH, "crop": SIZE}
    return Primus(parse(Primus.Config, options))


def build(encoder, **options):
    tree = {
        "size": SIZE,
        "hiding": {"strategy": "foreground", "block": PATCH, "ratio": [0.5, 0.5]},
        **options,
    }
    torch.manual_seed(1)
    return JEPA(parse(JEPA.Config, tree), encoder, Facts()).eval()


def one_batch(batch=2, *, first=0, **kwargs):
    return make_batch({"crop": [make_view(SIZE, batch=batch, **kwargs)]}, first=first)


def marked(index_BK):
    tokens = torch.zeros(len(index_BK), COUNT, dtype=torch.bool).scatter(1, index_BK, value=True)
    return voxels_marked(tokens, SIZE, PATCH)


# -- what is seen and what is predicted ------------------------------------------------------------------------------


def test_context_and_targets_are_disjoint_and_have_fixed_numbers(token_encoder):
    jepa = build(token_encoder)
    batch = one_batch(4)
    batch.views["crop"][0].foreground_BDHW[2:] = False
    choice = jepa.choose(batch)
    assert choice.context_BK.shape == (4, 6)
    assert choice.targets_BN.shape == (4, 12)
    for context, targets in zip(choice.context_BK, choice.targets_BN, strict=True):
        assert not set(context.tolist()) & set(targets.tolist())
    assert choice.counted_BN[:2].all(), "half of the tokens are hidden, and all hold body"
    assert not choice.counted_BN[2:].any()


def test_visible_tokens_that_are_no_context_do_not_count(token_encoder):
    jepa = build(token_encoder, context=0.2, targets=0.7)
    choice = jepa.choose(one_batch(4))
    assert choice.targets_BN.shape == (4, 17)
    assert (choice.counted_BN.sum(1) == 12).all(), "half of 24 tokens are hidden"


def test_a_draw_depends_on_seed_and_sample_index_alone(token_encoder):
    jepa = build(token_encoder)
    a, b = jepa.choose(one_batch(first=6, seed=1)), jepa.choose(one_batch(first=7, seed=2))
    assert torch.equal(a.context_BK[1], b.context_BK[0])
    assert torch.equal(a.targets_BN[1], b.targets_BN[0])
    assert not torch.equal(a.targets_BN[0], a.targets_BN[1])


def test_air_is_neither_seen_nor_predicted_where_there_is_enough_body(token_encoder):
    jepa = build(token_encoder, context=0.2, targets=0.2)
    batch = one_batch(4)
    view = batch.views["crop"][0]
    view.foreground_BDHW[:, :, :4] = False  # the first of three rows along H: 8 of 24 tokens
    choice = jepa.choose(batch)
    row = torch.arange(COUNT).reshape(GRID)[:, 0].flatten().tolist()
    assert choice.body_BK.all()
    assert choice.counted_BN.all()
    for index in (*choice.context_BK, *choice.targets_BN):
        assert not set(index.tolist()) & set(row)


# -- prediction ------------------------------------------------------------------------------------------------------


def test_voxels_outside_the_context_never_reach_the_prediction(token_encoder):
    jepa = build(token_encoder)
    batch = one_batch()
    view, choice = batch.views["crop"][0], jepa.choose(batch)
    before, _ = jepa.predict(view, choice)
    seen = marked(choice.context_BK)
    image = view.image_BCDHW
    view.image_BCDHW = image.masked_fill(~seen[:, None], 9.0)
    assert torch.equal(jepa.predict(view, choice)[0], before)
    view.image_BCDHW = image.masked_fill(seen[:, None], 9.0)
    assert not torch.allclose(jepa.predict(view, choice)[0], before, atol=1e-3)


def test_a_prediction_belongs_to_its_target(token_encoder):
    """Targets in another order are predicted and wanted in that order (a peer flattened its grid in two ways)."""
    jepa = build(token_encoder)
    batch = one_batch()
    view, choice = batch.views["crop"][0], jepa.choose(batch)
    order = torch.randperm(choice.targets_BN.shape[1])
    turned = choice._replace(targets_BN=choice.targets_BN[:, order])
    assert torch.allclose(jepa.predict(view, turned)[0], jepa.predict(view, choice)[0][:, order], atol=1e-4)
    assert torch.allclose(jepa.wanted(view, turned), jepa.wanted(view, choice)[:, order], atol=1e-4)
    context = choice._replace(context_BK=choice.context_BK.flip(1))
    assert torch.allclose(jepa.predict(view, context)[0], jepa.predict(view, choice)[0], atol=1e-4)


def test_predictions_tell_places_apart(token_encoder):
    jepa = build(token_encoder)
    batch = one_batch()
    with torch.no_grad():
        for parameter in jepa.predictor.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        predicted, _ = jepa.predict(batch.views["crop"][0], jepa.choose(batch))
    apart = torch.cdist(predicted[0], predicted[0]) + 10 * torch.eye(predicted.shape[1])
    assert apart.min() > 1e-3


def test_a_target_is_the_teachers_token_at_that_place(token_encoder):
    """With a teacher that only embeds patches, the wanted vector is the patch's own."""
    jepa = build(token_encoder)
    jepa.teacher.network.tokens = lambda image, keep, spacing: as_tokens(jepa.encoder.embed(image))
    batch = one_batch()
    view, choice = batch.views["crop"][0], jepa.choose(batch)
    number = choice.targets_BN[0, 3]
    d, h, w = (int(i) for i in torch.unravel_index(number, GRID))
    patch = view.image_BCDHW[:1, :, 8 * d : 8 * d + 8, 4 * h : 4 * h + 4, 6 * w : 6 * w + 6]
    vector = jepa.encoder.embed(patch).flatten()
    assert torch.allclose(
        jepa.wanted(view, choice)[0, 3], (vector - vector.mean()) / vector.std(correction=0), atol=1e-3
    )


def test_the_predictor_gets_the_places_of_its_tokens_in_millimetres(token_encoder):
    jepa = build(token_encoder)
    batch = one_batch()  # voxels of 3, 2 and 1 mm
    view, choice = batch.views["crop"][0], jepa.choose(batch)
    given = []
    jepa.predictor.register_forward_pre_hook(lambda _, inputs: given.extend(inputs[1:]))
    jepa.predict(view, choice)
    patch_mm = torch.tensor(PATCH) * torch.tensor([3.0, 2.0, 1.0])
    for index, places in zip((choice.context_BK, choice.targets_BN), given, strict=True):
        number = torch.stack(torch.unravel_index(index, GRID), dim=-1)
        assert torch.allclose(places - places[:, :1], (number - number[:, :1]) * patch_mm / 8.0, atol=1e-4)


# -- loss ------------------------------------------------------------------------------------------------------------


def test_the_loss_is_that_of_counted_targets(token_encoder):
    jepa = build(token_encoder)
    batch = one_batch()
    view = batch.views["crop"][0]
    view.foreground_BDHW[1] = False
    choice = jepa.choose(batch)
    wanted, (predicted, seen) = jepa.wanted(view, choice), jepa.predict(view, choice)
    expected = torch.nn.functional.smooth_l1_loss(predicted[0], wanted[0])
    output = jepa(batch, 0.0)
    assert torch.allclose(output.loss, expected, atol=1e-6)
    assert output.logs["counted_share"] == 0.5
    assert output.features_BE is not None
    assert torch.allclose(output.features_BE, seen.mean(1), atol=1e-5), "all body, or none at all"


def test_the_teacher_gets_no_gradient_and_the_student_does(token_encoder):
    jepa = build(token_encoder)
    jepa(one_batch(), 0.0).loss.backward()
    assert all(p.grad is None for p in jepa.teacher.parameters())
    gradient = jepa.encoder.patches.weight.grad
    assert gradient is not None
    assert gradient.abs().max() > 0
    for name, parameter in jepa.predictor.named_parameters():
        assert parameter.grad is not None, name


def test_the_teacher_follows_by_progress(token_encoder):
    jepa = build(token_encoder, momentum=[0.5, 1.0])
    with torch.no_grad():
        for parameter in jepa.encoder.parameters():
            parameter += 1.0
    student, teacher = jepa.encoder.patches.weight, jepa.teacher.network.patches.weight
    start = teacher.clone()
    jepa.after_step(1.0)
    assert torch.equal(teacher, start), "at the end it stays"
    jepa.after_step(0.0)
    assert torch.allclose(teacher, 0.5 * start + 0.5 * student)
    jepa.after_step(0.5)  # half a cosine: halfway from 0.5 to 1
    assert torch.allclose(teacher, 0.75 * (0.5 * start + 0.5 * student) + 0.25 * student)
    assert jepa.export().encoder is jepa.teacher.network


@pytest.mark.parametrize(
    ("size", "block"),
    [
        ((64, 64, 64), (16, 16, 16)),
        ((16, 48, 20), (8, 16, 10)),
        ((8, 40, 40), (8, 16, 16)),
        ((1, 40, 40), (1, 16, 16)),
    ],
)
def test_blocks_are_large_unless_they_are_given(size, block):
    assert parse(JEPA.Config, {"size": size}).hiding.block == block
    assert parse(JEPA.Config, {"size": size, "hiding": {"block": [4, 8, 8]}}).hiding.block == (4, 8, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 0.6, "targets": 0.5}, "must not exceed 1"),
        ({"momentum": [1.0, 0.9]}, "start <= end"),
        ({"predictor_dim": 20, "predictor_heads": 4}, "even number of at least 6"),
        ({"size": [8, 8, 8]}, "whole of size"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ConfigError, match=message):
        parse(JEPA.Config, options)


def test_a_crop_of_one_patch(token_encoder):
    with pytest.raises(UserError, match=r"whole of size|a single patch"):
        build(token_encoder, size=PATCH)
