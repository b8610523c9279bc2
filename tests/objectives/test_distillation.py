import math

import pytest
import torch

from medseg_ssl.config import ConfigError, parse
from medseg_ssl.objectives.distillation import Distillation
from medseg_ssl.types import Facts
from tests.objectives.conftest import make_batch, make_view

FACTS = Facts(classes=("background", "liver", "tumour"))
"""The segmenter knew background and liver; tumour is new."""


def build(encoder, **options):
    torch.manual_seed(1)
    return Distillation(parse(Distillation.Config, {"size": [16, 32, 16], **options}), encoder, FACTS).eval()


def batch():
    label = torch.zeros(2, 16, 32, 16, dtype=torch.uint8)
    label[:, 2:8, 2:8, 2:8] = 2
    view = make_view((16, 32, 16), label=label)
    view.known_classes_BK = torch.tensor([[True, False, True]] * 2)
    return make_batch({"labeled": [view]})


def as_logits(*p):
    return torch.tensor(p).log()[None, :, None, None, None]


@pytest.mark.parametrize("background", ["merged", "own"])
def test_nothing_is_forgotten_at_the_start(encoder, background):
    objective = build(encoder, background=background)
    with torch.no_grad():  # the new class has a head that says nothing, as far as the old ones are concerned
        objective.heads[0].bias[2] = -1e4
    objective.begin((0, 1))
    output = objective(batch(), 0.5)
    assert output.logs["distillation"].item() == pytest.approx(0.0, abs=1e-6)


def test_known_answers(encoder):
    """Old answer 0.6, 0.4. Now 0.3, 0.4 and 0.3 for the new class: the same, where it came from the background."""
    before, now = as_logits(0.4, 0.4, 0.2), as_logits(0.3, 0.4, 0.3)
    merged, own = build(encoder), build(encoder, background="own")
    for objective in (merged, own):
        objective.begin((0, 1))
    assert merged.divergence(now, before).item() == pytest.approx(0.0, abs=1e-6)
    expected = 0.6 * math.log(0.6 / (3 / 7)) + 0.4 * math.log(0.4 / (4 / 7))
    assert own.divergence(now, before).item() == pytest.approx(expected, rel=1e-4)
    moved = as_logits(0.4, 0.1, 0.5)
    expected = 0.6 * math.log(0.6 / 0.9) + 0.4 * math.log(0.4 / 0.1)
    assert merged.divergence(moved, before).item() == pytest.approx(expected, rel=1e-4)


def test_the_copy_stays_and_holds_the_network_back(encoder):
    given = batch()
    kept = {}
    for weight in (0.0, 100.0):
        objective = build(encoder, weight=weight)
        torch.manual_seed(2)
        for head in objective.heads:
            torch.nn.init.normal_(head.weight, std=0.5)
        objective.begin((0, 1))
        frozen = objective.previous.network.heads[0].weight.clone()
        optimizer = torch.optim.SGD(objective.heads.parameters(), lr=0.02)
        for _ in range(3):
            optimizer.zero_grad()
            objective(given, 0.5).loss.backward()
            optimizer.step()
            objective.after_step(0.5)
        assert torch.equal(objective.previous.network.heads[0].weight, frozen)
        view = given.views["labeled"][0]
        now, then = (
            network(view.image_BCDHW, view.spacing_mm_B3).detach()
            for network in (objective.student(), objective.previous.network)
        )
        kept[weight] = objective.divergence(now, then).mean().item()
    assert kept[100.0] < 0.5 * kept[0.0]


def test_needs_labels(encoder):
    with pytest.raises(ConfigError, match="needs an archive with labels"):
        Distillation(Distillation.Config(), encoder, Facts())
