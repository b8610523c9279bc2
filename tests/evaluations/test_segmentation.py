"""Evaluation of whole cases: rows in the labels' own space, and honest refusals."""

import numpy as np
import pytest

from medseg_ssl.config import UserError, find
from medseg_ssl.evaluations.base import Evaluation
from medseg_ssl.evaluations.segmentation import Segmentation, evaluate_cases, labeled_cases
from medseg_ssl.inference.predictor import Predictor
from tests.evaluations.fakes import MemoryArchive, Threshold, bright_cube, card

BOX = (slice(4, 9), slice(3, 11), slice(5, 8))


def archive_of_two():
    archive = MemoryArchive()
    for i in range(2):
        volume = bright_cube((14, 13, 12 + i), BOX)
        archive.add_scan(f"s{i}", volume, subject=f"p{i}", spacing=(2.0, 1.0, 1.0))
        archive.add_case(f"c{i}", [f"s{i}"], (volume > 0).astype(np.uint8))
    archive.set_split(train=("p0",), test=("p1",))
    return archive


def test_perfect_segmenter_scores_one():
    rows = evaluate_cases(
        Predictor(Threshold(), card()), archive_of_two(), ["c1", "c0"], nsd_tolerance_mm=1.0
    )
    assert [row["case"] for row in rows] == ["c1", "c0"]
    assert all(row["class"] == "bright" for row in rows)
    assert all((row["dice"], row["nsd"], row["hd95_mm"]) == (1.0, 1.0, 0.0) for row in rows)


def test_blind_segmenter_gets_the_worst_of_every_metric():
    seen = []
    rows = evaluate_cases(
        Predictor(Threshold(above=1e6), card()),
        archive_of_two(),
        ["c0"],
        nsd_tolerance_mm=1.0,
        on_case=seen.append,
    )
    assert rows[0]["dice"] == 0.0
    assert rows[0]["hd95_mm"] == pytest.approx(np.sqrt(28**2 + 13**2 + 12**2))
    assert seen == ["c0"]


def test_class_unknown_in_a_case_is_left_empty():
    archive = archive_of_two()
    archive.cases["c0"] = archive.cases["c0"].model_copy(update={"known_classes": (True, False)})
    rows = evaluate_cases(Predictor(Threshold(), card()), archive, ["c0", "c1"], nsd_tolerance_mm=1.0)
    assert [row["dice"] for row in rows] == [None, 1.0]


def test_scores_of_the_split_subset():
    evaluation = find("medseg_ssl.evaluations", "segmentation", Evaluation)
    assert evaluation is Segmentation
    scores = list(Segmentation(Segmentation.Config()).run(Predictor(Threshold(), card()), archive_of_two()))
    by_name = {s.name: s for s in scores}
    assert by_name["dice"].value == by_name["dice/bright"].value == 1.0
    assert by_name["hd95_mm"].unit == "mm"
    assert [row["case"] for row in by_name["dice"].per_case] == ["c1"]


def test_refusals_name_what_differs():
    archive = archive_of_two()
    with pytest.raises(UserError, match="background, liver, the archive has background, bright"):
        evaluate_cases(
            Predictor(Threshold(), card(classes=("background", "liver"))),
            archive,
            ["c0"],
            nsd_tolerance_mm=1.0,
        )
    with pytest.raises(UserError, match="no subset named 'tests'; known: train, development, test"):
        labeled_cases(archive, subset="tests")
    with pytest.raises(UserError, match="no labeled case in subset 'development'"):
        labeled_cases(archive, subset="development")
    with pytest.raises(UserError, match="c9"):
        evaluate_cases(Predictor(Threshold(), card()), archive, ["c0", "c9"], nsd_tolerance_mm=1.0)
