import pytest
import torch

from medseg_ssl.config import ConfigError, parse
from medseg_ssl.objectives.pseudo_labels import PseudoLabels
from medseg_ssl.types import UNKNOWN_LABEL, Facts
from tests.objectives.test_mean_teacher import FACTS, batch


def build(encoder, **options):
    torch.manual_seed(1)
    return PseudoLabels(parse(PseudoLabels.Config, {"size": [16, 32, 16], **options}), encoder, FACTS).eval()


def answer(network, *logits):
    """Make a network's head say the same everywhere."""
    with torch.no_grad():
        network.heads[0].weight.zero_()
        network.heads[0].bias.copy_(torch.tensor(logits))


@pytest.mark.parametrize("source", ["teacher", "network"])
def test_the_label_is_the_confident_class_of_the_crop_as_it_was(encoder, source):
    objective = build(encoder, labels_from=source, threshold=0.9)
    given = batch()
    other = given.views["unlabeled"][0]
    other.valid_BDHW[:, :, 30:] = False
    network = objective.student() if source == "network" else objective.teacher.network
    answer(network, 0.0, 4.0, 0.0)  # p = e⁴ / (e⁴ + 2) = 0.965
    label = objective.pseudo_label(other)
    assert (label[:, :, :30] == 1).all()
    assert (label[:, :, 30:] == UNKNOWN_LABEL).all()
    answer(network, 0.0, 2.0, 0.0)  # p = 0.787
    assert (objective.pseudo_label(other) == UNKNOWN_LABEL).all()
    assert objective(given, 1.0).logs["pseudo_loss"] == 0
    with torch.no_grad():
        network.heads[0].weight.normal_(generator=torch.Generator().manual_seed(0))
    before = objective.pseudo_label(other)
    other.image_BCDHW = torch.zeros_like(other.image_BCDHW)
    assert torch.equal(objective.pseudo_label(other), before), "the augmented crop sets no label"


def test_the_loss_is_that_of_fixmatch(encoder):
    """Cross-entropy summed over the confident voxels, divided by all; nothing before the ramp."""
    objective = build(encoder, threshold=0.5, ramp=[0.2, 0.4], loss={"region_weight": 0.0}, weight=2.0)
    given = batch()
    other = given.views["unlabeled"][0]
    with torch.no_grad():
        objective.teacher.network.heads[0].weight.normal_(0, 0.5, generator=torch.Generator().manual_seed(0))
        label = objective.pseudo_label(other)
        counted = label != UNKNOWN_LABEL
        assert 0.1 < counted.float().mean() < 0.999
        log_p = objective.student()(other.image_BCDHW, other.spacing_mm_B3).log_softmax(1)
        entropy = -log_p.gather(1, label.masked_fill(~counted, 0)[:, None])[:, 0]
        expected = (entropy * counted).sum() / counted.numel()
        base, full = objective(given, 0.2), objective(given, 1.0)
    assert base.logs["pseudo_loss"] == 0
    assert full.logs["pseudo_loss"].item() == pytest.approx(expected.item(), rel=1e-4)
    assert (full.loss - base.loss).item() == pytest.approx(2 * expected.item(), rel=1e-3)
    assert full.logs["confident_share"].item() == pytest.approx(counted.float().mean().item())


def test_only_a_teacher_is_kept_in_the_state(encoder):
    assert build(encoder, labels_from="network").teacher is None
    names = set(build(encoder).state_dict()) - set(build(encoder, labels_from="network").state_dict())
    assert names
    assert all(name.startswith("teacher.") for name in names)


def test_needs_labels(encoder):
    with pytest.raises(ConfigError, match="needs an archive with labels"):
        PseudoLabels(PseudoLabels.Config(), encoder, Facts())
