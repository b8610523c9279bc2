import math

import pytest
import torch

from medseg_ssl.config import ConfigError, parse
from medseg_ssl.objectives.mean_teacher import MeanTeacher
from medseg_ssl.objectives.segmentation import Segmentation
from medseg_ssl.types import Facts
from tests.objectives.conftest import make_batch, make_view

FACTS = Facts(classes=("background", "liver", "tumour"))


def build(encoder, **options):
    torch.manual_seed(1)
    return MeanTeacher(parse(MeanTeacher.Config, {"size": [16, 32, 16], **options}), encoder, FACTS)


def batch():
    label = torch.zeros(2, 16, 32, 16, dtype=torch.uint8)
    label[:, 2:8, 2:8, 2:8] = 1
    labeled, unlabeled = make_view((16, 32, 16), label=label), make_view((16, 32, 16), seed=3)
    unlabeled.clean_BCDHW = unlabeled.image_BCDHW.square()
    return make_batch({"labeled": [labeled], "unlabeled": [unlabeled]})


def test_before_its_ramp_it_is_supervised_segmentation(encoder):
    mean_teacher = build(encoder, ramp=[0.25, 0.5]).eval()
    torch.manual_seed(1)
    plain = Segmentation(parse(Segmentation.Config, {"size": [16, 32, 16]}), encoder, FACTS).eval()
    given = batch()
    for progress in (0.0, 0.2):
        output = mean_teacher(given, progress)
        assert torch.equal(output.loss, plain(given, progress).loss)
        assert output.logs["consistency"] == 0
    assert build(encoder)(given, 0.0).logs["consistency"] == 0


def test_consistency_is_the_mean_squared_difference_and_counts_by_the_ramp(encoder):
    objective = build(encoder, ramp=[0.0, 0.5], weight=3.0).eval()
    given = batch()
    other = given.views["unlabeled"][0]
    other.valid_BDHW[:, :4] = False
    with torch.no_grad():
        student = objective.student()(other.image_BCDHW, other.spacing_mm_B3).softmax(1)
        teacher = objective.teacher.network(other.clean_BCDHW, other.spacing_mm_B3).softmax(1)
        expected = (student - teacher)[:, :, 4:].square().mean()
        outputs = [objective(given, p) for p in (0.25, 0.5, 1.0)]
        base = objective(given, 0.0).loss
    assert outputs[0].logs["consistency"].item() == pytest.approx(expected.item(), rel=1e-5)
    for output, weight in zip(outputs, (1.5, 3.0, 3.0), strict=True):
        assert (output.loss - base).item() == pytest.approx(weight * expected.item(), rel=1e-3)


def test_the_teacher_follows(encoder):
    objective = build(encoder, momentum=0.9, ramp=[0.0, 0.5])
    with torch.no_grad():
        for parameter in objective.heads.parameters():
            parameter.add_(1.0)
    head, taught = objective.heads[0].weight, objective.teacher.network.heads[0].weight
    before = taught.clone()
    objective.after_step(1.0)
    assert torch.allclose(taught, before + 0.1, atol=1e-6)
    objective.after_step(0.25)  # half risen: the average of sqrt(10) steps
    assert torch.allclose(head - taught, torch.full_like(head, 0.9 * (1 - 10**-0.5)), atol=1e-5)
    objective.after_step(0.0)
    assert torch.equal(taught, head), "a teacher of no worth yet becomes the student"


def test_unsure_voxels_do_not_count_and_the_noise_is_a_function_of_the_sample(encoder):
    objective = build(encoder, noisy_passes=2, ramp=[0.0, 1.0]).eval()
    given = batch()
    with torch.no_grad():
        for head in objective.teacher.network.heads:
            head.weight.zero_()
            head.bias.zero_()
    assert objective(given, 0.5).logs["certain_share"] == 0, "equal probabilities have the largest entropy"
    with torch.no_grad():
        objective.teacher.network.heads[0].bias.copy_(torch.tensor([4.0, 0.0, 0.0]))
    first, second = (objective.wanted(given.views["unlabeled"][0], given, 0.5) for _ in range(2))
    assert first[1].all()
    p = math.exp(4) / (math.exp(4) + 2)
    assert first[0][:, 0].mean().item() == pytest.approx(p, rel=1e-5)
    assert torch.equal(first[0], second[0])


def test_needs_labels_and_a_ramp_that_rises(encoder):
    with pytest.raises(ConfigError, match="needs an archive with labels"):
        MeanTeacher(MeanTeacher.Config(), encoder, Facts())
    with pytest.raises(ConfigError, match=r"from 0 to 1 and rising, got \[0.6, 0.5\]"):
        parse(MeanTeacher.Config, {"ramp": [0.6, 0.5]})
    with pytest.raises(ConfigError, match="both 0"):
        parse(MeanTeacher.Config, {"loss": {"voxel_weight": 0, "region_weight": 0}})
