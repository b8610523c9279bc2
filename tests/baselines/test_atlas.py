"""Atlases: what moved is found, and a vote that listens to likeness."""

import numpy as np
import pytest
import torch

from medseg_ssl.baselines.atlas import Atlas, _likeness
from medseg_ssl.config import UserError
from tests.baselines.bodies import dice, truth, write


def test_labels_follow_the_organs(tmp_path):
    archive = write(tmp_path, shifts=((0, 0, 0), (0, 1, -2)), noise=0.0)
    before = dice(truth(archive, "c0"), truth(archive, "c1"))
    baseline = Atlas(Atlas.Config())
    baseline.fit(archive, ["c0"], seed=0)
    ((_, found),) = baseline.predict_cases(archive, ["c1"])
    assert before < 0.7
    assert dice(found, truth(archive, "c1")) > 0.9
    assert dice(found, truth(archive, "c1"), 2) > 0.9


def test_likeness_is_a_local_correlation():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(1, 1, 9, 11, 13, generator=generator)
    torch.testing.assert_close(_likeness(a, 3 * a + 5), torch.ones_like(a), atol=1e-3, rtol=0)
    torch.testing.assert_close(_likeness(a, -a), torch.ones_like(a), atol=1e-3, rtol=0)
    assert _likeness(a, torch.zeros_like(a)).max() == 0.0
    half = torch.where(torch.arange(13) < 6, a, torch.randn(a.shape, generator=generator))
    found = _likeness(a, half)
    assert found[..., :3].min() > 0.99
    assert found[..., 10:].max() < 0.5


def test_an_atlas_that_is_unlike_has_little_to_say(tmp_path, monkeypatch):
    """Without any registration: two of three atlases stand elsewhere; most votes are wrong, the likeness is right."""
    monkeypatch.setattr("medseg_ssl.baselines.atlas._STEPS", (0, 0))
    archive = write(tmp_path, shifts=((0, 0, 0), (0, 6, -4), (0, 6, -4), (0, 0, 0)))
    scores = {}
    for vote in ("majority", "similarity"):
        baseline = Atlas(Atlas.Config(vote=vote))
        baseline.fit(archive, ["c0", "c1", "c2"], seed=0)
        ((_, found),) = baseline.predict_cases(archive, ["c3"])
        scores[vote] = dice(found, truth(archive, "c3"))
    assert scores["majority"] < 0.1
    assert scores["similarity"] > 0.6


def test_at_most_so_many_atlases(tmp_path):
    archive = write(tmp_path)
    baseline = Atlas(Atlas.Config(atlases=1))
    baseline.fit(archive, ["c1", "c0"], seed=0)
    assert len(baseline._atlases.of(archive, "c2")) == 1
    with pytest.raises(UserError, match=r"atlas.channel is 1, the cases have the channels 0 to 0"):
        Atlas(Atlas.Config(channel=1)).fit(archive, ["c0"], seed=0)


def test_classes_nobody_states_leave_the_vote_to_those_who_do(tmp_path, monkeypatch):
    monkeypatch.setattr("medseg_ssl.baselines.atlas._STEPS", (0, 0))
    archive = write(tmp_path, shifts=((0, 0, 0),) * 4, noise=0.0)
    for case in ("c0", "c1"):
        row = archive.cases[case]
        archive.cases[case] = row.model_copy(update={"known_classes": (True, False, True)})
    baseline = Atlas(Atlas.Config(vote="majority"))
    baseline.fit(archive, ["c0", "c1", "c2"], seed=0)
    ((_, found),) = baseline.predict_cases(archive, ["c3"])
    # one of three atlases states the liver: its vote is all there is, not a third
    assert dice(found, truth(archive, "c3")) > 0.8
    assert np.isin(found, (0, 1, 2)).all()
