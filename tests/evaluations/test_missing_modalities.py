"""Every subset of the channels: a segmenter that looks at one of them loses all without it, and nothing else."""

import numpy as np
import pytest

from medseg_ssl.config import ConfigError
from medseg_ssl.evaluations.missing_modalities import MissingModalities, channel_subsets
from medseg_ssl.inference.predictor import Predictor

from .fakes import MemoryArchive, Threshold, bright_cube, card

SHAPE, BOX = (14, 18, 12), (slice(4, 9), slice(5, 13), slice(3, 8))


@pytest.fixture
def archive():
    made = MemoryArchive()
    label = np.zeros(SHAPE, np.uint8)
    label[BOX] = 1
    for n in range(2):
        made.add_scan(f"ct{n}", bright_cube(SHAPE, BOX), subject=f"s{n}", spacing=(2.0, 1.0, 1.5))
        raw = bright_cube(SHAPE, BOX) + 200
        made.add_scan(f"mr{n}", raw, subject=f"s{n}", modality="MR", unit="raw", spacing=(2.0, 1.0, 1.5))
        made.add_case(f"c{n}", [f"ct{n}", f"mr{n}"], label)
    made.set_split(test=("s0", "s1"))
    return made


def test_scores_of_every_subset(archive):
    segmenter = Threshold(above=0.2)  # looks at channel 0
    predictor = Predictor(segmenter, card(modalities=("CT", "MR"), channels_in=2, crop_size=(16, 16, 16)))
    scores = list(MissingModalities(MissingModalities.Config()).run(predictor, archive))
    dice = {score.name: score.value for score in scores if score.name.startswith("dice/")}
    assert dice == {"dice/CT": 1.0, "dice/MR": 0.0, "dice/CT+MR": 1.0}
    rows = scores[0].per_case
    assert [(row["given"], row["case"]) for row in rows][:3] == [("CT", "c0"), ("CT", "c1"), ("MR", "c0")]
    assert all(score.per_case is None for score in scores[1:])
    assert predictor.segmenter is segmenter, "the predictor itself is left alone"


def test_subsets_have_names_and_one_channel_misses_nothing(archive):
    names = [name for _, name in channel_subsets(("MR", "CT", "MR"))]
    assert names == ["MR0", "CT", "MR2", "MR0+CT", "MR0+MR2", "CT+MR2", "MR0+CT+MR2"]
    with pytest.raises(ConfigError, match="needs a segmenter of several channels"):
        channel_subsets(("CT",))
    with pytest.raises(ConfigError, match="not an encoder"):
        next(MissingModalities(MissingModalities.Config()).run("encoder", archive))  # pyright: ignore[reportArgumentType]
