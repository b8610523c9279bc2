import pytest
import torch

from medseg_ssl.config import ConfigError, parse
from medseg_ssl.nets.segmentation_loss import merge_unknown, region_loss
from medseg_ssl.objectives.segmentation import Segmentation
from medseg_ssl.types import UNKNOWN_LABEL, Facts
from tests.objectives.conftest import make_batch, make_view

FACTS = Facts(classes=("background", "liver", "tumour"))


def build(encoder, **options):
    torch.manual_seed(1)
    return Segmentation(parse(Segmentation.Config, {"size": [16, 16, 16], **options}), encoder, FACTS)


def labeled(known=None):
    label = torch.zeros(2, 16, 16, 16, dtype=torch.uint8)
    label[:, 2:8, 2:8, 2:8] = 1
    label[:, 9:12, 9:12, 9:12] = 2
    view = make_view((16, 16, 16), label=label)
    view.known_classes_BK = known
    return make_batch({"labeled": [view]})


def test_agrees_with_monai_when_all_is_known(encoder):
    from monai.losses import DiceCELoss

    objective = build(encoder, batch_region=True)
    logits = torch.randn(2, 3, 8, 8, 8)
    label = torch.randint(0, 3, (2, 8, 8, 8))
    known = torch.ones(2, 3, dtype=torch.bool)
    voxel, region = objective.loss.of_level(logits, label, known)
    reference = DiceCELoss(
        include_background=False, to_onehot_y=True, softmax=True, batch=True, smooth_nr=1e-5, smooth_dr=1e-5
    )
    assert (voxel + region).item() == pytest.approx(reference(logits, label[:, None]).item(), rel=1e-5)


@pytest.mark.parametrize(("kind", "expected"), [("dice", 1 - 2 * 4 / (8 + 4)), ("jaccard", 1 - 4 / 8)])
def test_region_loss_known_answers(kind, expected):
    p, truth = torch.zeros(1, 1, 2, 2, 2), torch.zeros(1, 1, 2, 2, 2)
    p[:] = 1.0
    truth[:, :, 0] = 1.0
    known = torch.ones(1, 1, dtype=torch.bool)
    assert region_loss(p, truth, known, kind=kind, over_batch=False).item() == pytest.approx(
        expected, abs=1e-5
    )
    assert region_loss(p, truth, ~known, kind=kind, over_batch=False).item() == 0.0


def test_focal_is_cross_entropy_at_gamma_0_and_less_above(encoder):
    logits, label = torch.randn(1, 3, 4, 4, 4), torch.randint(0, 3, (1, 4, 4, 4))
    known = torch.ones(1, 3, dtype=torch.bool)
    plain = build(encoder).loss.of_level(logits, label, known)[0]
    zero = build(encoder, voxel_loss="focal", focal_gamma=0.0).loss.of_level(logits, label, known)[0]
    two = build(encoder, voxel_loss="focal").loss.of_level(logits, label, known)[0]
    assert torch.allclose(plain, zero)
    assert two < plain


def test_unknown_classes_do_not_enter_the_loss(encoder):
    """Where class 2 is unknown, predicting it on background costs nothing: its probability is the background's."""
    objective = build(encoder)
    known = torch.tensor([[True, True, False]])
    label = torch.zeros(1, 4, 4, 4, dtype=torch.long)
    label[:, 0] = 1
    background, tumour = torch.zeros(1, 3, 4, 4, 4), torch.zeros(1, 3, 4, 4, 4)
    background[:, 0], tumour[:, 2] = 9.0, 9.0
    for logits in (background, tumour):
        logits[:, :, 0] = torch.tensor([0.0, 9.0, 0.0])[None, :, None, None]
    a, b = objective.loss.of_level(background, label, known), objective.loss.of_level(tumour, label, known)
    assert torch.allclose(a[0], b[0], atol=1e-6)
    assert torch.allclose(a[1], b[1], atol=1e-6)
    all_known = torch.ones(1, 3, dtype=torch.bool)
    assert objective.loss.of_level(tumour, label, all_known)[0] > 1.0


def test_merge_unknown_keeps_probabilities_of_known_classes():
    logits = torch.randn(1, 4, 2, 2, 2)
    known = torch.tensor([[True, True, False, True]])
    p, q = torch.softmax(logits, 1), torch.softmax(merge_unknown(logits, known), 1)
    assert torch.allclose(q[:, 1], p[:, 1], atol=1e-6)
    assert torch.allclose(q[:, 0], p[:, 0] + p[:, 2], atol=1e-6)
    assert q[:, 2].max() < 1e-6


def test_padding_and_unstated_voxels_do_not_count(encoder):
    objective = build(encoder, deep_supervision=False).eval()
    batch = labeled()
    view = batch.views["labeled"][0]
    view.valid_BDHW[:, 12:] = False
    view.label_BDHW[:, :, :2] = UNKNOWN_LABEL
    before = objective(batch, 0.0).loss
    view.label_BDHW[:, 12:] = 2
    assert torch.equal(objective(batch, 0.0).loss, before)


def test_loss_falls_on_one_batch(encoder):
    objective = build(encoder)
    batch = labeled()
    view = batch.views["labeled"][0]
    view.image_BCDHW = view.image_BCDHW * 0.1 + view.label_BDHW[:, None].float()
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = objective(batch, 0.0).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_needs_labels(encoder):
    with pytest.raises(ConfigError, match="needs an archive with labels"):
        Segmentation(Segmentation.Config(), encoder, Facts())
    with pytest.raises(ConfigError, match="both 0"):
        parse(Segmentation.Config, {"voxel_weight": 0, "region_weight": 0})
