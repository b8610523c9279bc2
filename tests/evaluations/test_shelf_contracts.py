"""Every evaluation on the shelf: finite scores, the same twice, and no test subject unless its config says so."""

import math

import pytest
import torch
from torch import nn

from medseg_ssl.config import ConfigError, find, parse, shelf
from medseg_ssl.data.archive import Archive
from medseg_ssl.evaluations.base import Evaluation, EvaluationConfig
from medseg_ssl.inference.frozen import FrozenEncoder
from medseg_ssl.inference.predictor import Predictor
from medseg_ssl.types import Score
from tests.evaluations.fakes import Threshold, card
from tests.train.archives import TEST, write_archive

SHELF = shelf("medseg_ssl.evaluations")
ONE_CHANNEL = [
    name for name in SHELF if name != "missing_modalities"
]  # which needs several; its own tests have them


class Filters(nn.Module):
    """Two levels of fixed random convolutions."""

    channels, strides = (4, 6), ((1, 1, 1), (2, 2, 2))

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.fine = nn.Parameter(torch.randn(4, 1, 3, 3, 3, generator=generator) / 5)
        self.deep = nn.Parameter(torch.randn(6, 4, 2, 2, 2, generator=generator) / 5)

    def forward(self, image_BCDHW, spacing_mm_B3=None):
        fine = torch.relu(nn.functional.conv3d(image_BCDHW, self.fine, padding=1))
        return [fine, torch.relu(nn.functional.conv3d(fine, self.deep, stride=2))]


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return write_archive(tmp_path_factory.mktemp("evaluations") / "archive")


@pytest.fixture
def opened(archive, monkeypatch):
    """The archive, the subjects of every scan and label that is read, and the labeled cases among them."""
    read, labels = set(), set()

    def watch(name):
        original = getattr(Archive, name)

        def watched(self, key, *more):
            row = self.scans.get(key) or self.cases[key]
            read.add(row.subject)
            if name != "read":
                labels.add(key)
            return original(self, key, *more)

        monkeypatch.setattr(Archive, name, watched)

    for name in ("read", "read_label", "original_label"):
        watch(name)
    return archive, read, labels


def build(name, archive, **options):
    cls = find("medseg_ssl.evaluations", name, Evaluation)
    given = {key: value for key, value in options.items() if key in cls.Config.model_fields}
    small = {"crop_size": [8, 8, 10]} if "crop_size" in cls.Config.model_fields else {}
    if "modalities" in cls.Config.model_fields and name == "retrieval":
        small["modalities"] = ["CT", "MR"]
    policies = {m: policy.model_dump(mode="json") for m, policy in archive.intensity.items()}
    described = card(
        classes=archive.classes,
        intensity=policies,
        modalities=("CT",),
        kind="encoder" if cls.of == "encoder" else "segmenter",
    )
    model = {"encoder": FrozenEncoder, "segmenter": Predictor}[cls.of]
    network = Filters() if cls.of == "encoder" else Threshold(1.0)
    return cls(parse(cls.Config, {**cls.sparing, **small, **given})), model(network, described)


@pytest.mark.parametrize("name", ONE_CHANNEL)
def test_scores_are_finite_deterministic_and_not_of_test_subjects(name, opened):
    archive, read, labels = opened
    evaluation, model = build(name, archive, subset="development")
    found = list(evaluation.run(model, archive))
    assert found
    assert all(isinstance(score, Score) for score in found)
    assert all(math.isfinite(score.value) for score in found), [
        s for s in found if not math.isfinite(s.value)
    ]
    assert len({score.name for score in found}) == len(found)
    assert read
    assert not read & set(TEST)
    assert evaluation.reads_labels == bool(labels)
    again = list(evaluation.run(model, archive))
    assert [(s.name, float(s.value)) for s in again] == [(s.name, float(s.value)) for s in found]


@pytest.mark.parametrize("name", ONE_CHANNEL)
def test_test_subjects_are_read_when_asked_for(name, opened):
    archive, read, _ = opened
    if name == "transferability":  # chooses among sources, so it never takes them
        with pytest.raises(ConfigError, match="subset: Input should be 'train' or 'development'"):
            build(name, archive, subset="test")
        return
    evaluation, model = build(name, archive, subset="test")
    list(evaluation.run(model, archive))
    if "subset" in evaluation.config.model_dump():
        assert read & set(TEST)


@pytest.mark.parametrize("name", SHELF)
def test_options(name):
    cls = find("medseg_ssl.evaluations", name, Evaluation)
    assert issubclass(cls.Config, EvaluationConfig)
    assert cls.of in ("encoder", "segmenter")
    assert parse(cls.Config, dict(cls.sparing)), "what a training run takes is a valid choice"
