"""Robustness: every corruption does what its unit says, and its cost is paired by case."""

import numpy as np
import pytest

from finetune.beside import read_rows, write_robustness
from medseg_ssl.analysis.tables import write_csv
from medseg_ssl.config import ConfigError, parse
from medseg_ssl.evaluations._corruptions import Volume, corrupt
from medseg_ssl.evaluations.robustness import (
    CASE_COLUMNS,
    UNDISTURBED,
    Robustness,
    Setting,
    robustness_table,
)
from medseg_ssl.inference.predictor import Predictor
from tests.evaluations.fakes import MemoryArchive, Threshold, bright_cube, card

SPACING = (3.0, 1.0, 2.0)
SHAPE = (14, 15, 12)


def volume(array, valid=None, spacing=SPACING):
    return Volume(array.astype(np.float32), valid, spacing, 200.0, "abc")


def test_noise_has_the_stated_deviation_and_grows_from_one_draw():
    flat = volume(np.zeros((30, 31, 32)))
    weak, strong = (corrupt("noise", flat, amount, seed=1)[0] for amount in (10.0, 30.0))
    assert weak.std() == pytest.approx(10.0, rel=0.02)
    assert np.allclose(strong, 3 * weak, rtol=1e-5)
    assert not np.allclose(corrupt("noise", flat, 10.0, seed=2)[0], weak)
    relative = corrupt("relative_noise", flat, 0.05, seed=1)[0]
    assert relative.std() == pytest.approx(0.05 * 200, rel=0.02)


def test_blur_spreads_a_point_by_millimetres():
    point = np.zeros((21, 41, 31))
    point[10, 20, 15] = 1.0
    blurred, _ = corrupt("blur", volume(point), 6.0, seed=0)
    assert blurred.sum() == pytest.approx(1.0, abs=1e-3)
    for axis, spacing in enumerate(SPACING):
        others = tuple(a for a in range(3) if a != axis)
        profile = blurred.sum(axis=others)
        place = (np.arange(len(profile)) - len(profile) // 2) * spacing
        deviation_mm = np.sqrt((profile * place**2).sum() / profile.sum())
        assert deviation_mm == pytest.approx(6.0 / 2.3548, rel=0.03)


def test_blur_takes_nothing_from_where_there_is_no_data():
    array = np.full(SHAPE, 40.0)
    valid = np.ones(SHAPE, dtype=bool)
    array[:, 8:], valid[:, 8:] = -5000.0, False
    for kind in ("blur", "resolution"):
        blurred, still = corrupt(kind, volume(array, valid), 5.0, seed=0)
        assert np.allclose(blurred[valid], 40.0, atol=1e-3), kind
        assert np.array_equal(still, valid)


def test_resolution_leaves_longer_voxels_alone():
    stripes = np.zeros(SHAPE)
    stripes[::2] = 1.0
    same, _ = corrupt("resolution", volume(stripes), 3.0, seed=0)
    assert np.allclose(same, stripes), "voxels of 3 mm along D are no shorter than 3 mm"
    across = np.broadcast_to((np.arange(15) % 2)[None, :, None].astype(float), SHAPE)
    assert corrupt("resolution", volume(across), 3.0, seed=0)[0].std() < 0.5 * across.std()


def test_missing_slices_are_filled_between_their_neighbours_along_the_longest_voxels():
    """Of a ramp nothing is lost but beyond the outermost kept slice; of noise the stated share of the slices is."""
    ramp = np.broadcast_to(np.arange(14.0)[:, None, None] * 7 - 30, SHAPE)
    filled, valid = corrupt("missing_slices", volume(ramp), 0.5, seed=0)
    assert valid is None, "data everywhere, as before"
    same = np.isclose(filled, ramp, atol=1e-3).all(axis=(1, 2))
    assert same[:-1].all()
    assert (filled[-1] == filled[-2]).all(), (
        "the last slice, lost with this seed, has no neighbour on one side"
    )
    noise = np.random.default_rng(0).normal(0, 50, SHAPE)
    lost = (corrupt("missing_slices", volume(noise), 0.25, seed=0)[0] != noise.astype(np.float32)).any(
        axis=(1, 2)
    )
    assert lost.sum() == round(0.25 * 14)
    alone = corrupt("missing_slices", volume(noise), 1.0, seed=0)[0]
    assert (alone == alone[:1]).all(), "at least one stays"


def test_a_lost_slice_takes_nothing_from_where_its_neighbours_have_no_data():
    array, valid = np.full(SHAPE, 40.0), np.ones(SHAPE, dtype=bool)
    valid[:, 8:], valid[5, :3] = False, False
    array[~valid] = -5000.0
    filled, still = corrupt("missing_slices", volume(array, valid), 0.5, seed=0)
    assert np.allclose(filled[still], 40.0, atol=1e-3)
    assert not still[:, 8:].any()
    assert still[:, 3:8].all()


def test_lost_slices_cost_a_threshold_nothing_where_the_neighbours_show_the_same():
    """The predictor's rule for voxels without data would have lost them all."""
    found = scored(world(), "CT", {"missing_slices": [0.5]})[2]
    assert found["missing_slices-1/dice"] > 0.8, "no data in half the slices would leave some 2/3"


def test_shift_scaling_and_bias_field():
    array = np.linspace(1, 2, 14 * 15 * 12).reshape(SHAPE)
    assert np.allclose(corrupt("shift", volume(array), -20.0, seed=0)[0], array - 20)
    assert np.allclose(corrupt("scaling", volume(array), 1.5, seed=0)[0], 1.5 * array)
    weak, strong = (np.log(corrupt("bias_field", volume(array), a, seed=3)[0] / array) for a in (0.1, 0.2))
    assert np.allclose(strong, 2 * weak, atol=1e-4)
    assert np.ptp(weak) > 0.05
    assert np.abs(np.diff(weak, axis=1)).max() < 0.1 * np.ptp(weak) * 15 / 3


def test_nothing_comes_in_from_beyond_the_volume():
    flat = volume(np.full(SHAPE, 40.0))
    for kind in ("blur", "resolution"):
        assert np.allclose(corrupt(kind, flat, 5.0, seed=0)[0], 40.0, atol=1e-3), kind


def world(modality="CT", unit="HU"):
    archive = MemoryArchive()
    box = (slice(4, 9), slice(3, 11), slice(5, 8))
    for i in range(3):
        scan = bright_cube((14, 13, 12), box) + (0 if modality == "CT" else 200)
        archive.add_scan(f"s{i}", scan, subject=f"p{i}", modality=modality, unit=unit)
        archive.add_case(f"c{i}", [f"s{i}"], (scan > (0 if modality == "CT" else 200)).astype(np.uint8))
    archive.set_split(test=("p0", "p1", "p2"))
    return archive


def scored(archive, modality, strengths, above=0.0):
    evaluation = Robustness(parse(Robustness.Config, {"strengths": strengths}))
    model = Predictor(Threshold(above=above), card(modalities=(modality,)))
    return evaluation, model, {s.name: s.value for s in evaluation.run(model, archive)}


def test_a_shift_matters_where_it_crosses_the_threshold():
    """The network asks for more than 0 HU; the cube has 100 HU, the rest −100."""
    _, _, scores = scored(world(), "CT", {"shift": [50, 120, -120]})
    assert scores["undisturbed/dice"] == scores["shift-1/dice"] == 1.0
    assert scores["shift-2/dice"] < 0.5
    assert scores["shift-3/dice"] == 0.0


def test_what_the_policy_takes_out_costs_nothing():
    """A robust z-score undoes a factor: its statistics are taken anew, as ``prepare`` would."""
    archive = world("MR", "raw")
    for above in (0.0, 1.0):
        _, _, scores = scored(archive, "MR", {"scaling": [2.0]}, above=above)
        assert scores["scaling-1/dice"] == scores["undisturbed/dice"]


def test_only_what_makes_sense_for_the_modalities_is_tried():
    config = Robustness.Config()
    names = {m: {s.corruption for s in Robustness(config).settings([m])} for m in ("CT", "MR", "PT")}
    assert names["CT"] == {UNDISTURBED, "noise", "blur", "resolution", "missing_slices", "shift"}
    assert "bias_field" in names["MR"]
    assert "bias_field" not in names["PT"]


def test_the_table_is_paired_and_adjusted():
    evaluation, model, _ = scored(world(), "CT", {"shift": [50, 120], "missing_slices": [0.4]})
    rows = []
    for setting in evaluation.settings(["CT"]):
        rows += evaluation.rows(model, world(), ["c0", "c1", "c2"], setting)
    for row in rows:  # make the loss of the second shift 0.2, 0.4 and 0.6
        row["dice"] = 1.0 if row["severity"] != 2 else {"c0": 0.8, "c1": 0.6, "c2": 0.4}[row["case"]]
    once = robustness_table(rows, subjects={f"c{i}": f"p{i}" for i in range(3)})
    table = {(r["corruption"], r["severity"], r["class"], r["metric"]): r for r in once}
    found = table["shift", 2, "mean over classes", "dice"]
    assert found["difference"] == pytest.approx(-0.4)
    half = 4.3027 * 0.2 / np.sqrt(3)
    assert found["ci_low"] == pytest.approx(-0.4 - half, rel=1e-3)
    assert found["p"] == pytest.approx(0.0742, abs=1e-3)
    assert found["p_holm"] == pytest.approx(3 * found["p"])
    assert np.isnan(table[UNDISTURBED, 0, "bright", "dice"]["p"])
    assert table["shift", 1, "bright", "dice"]["difference"] == 0

    copies = [{**row, "case": f"{row['case']}{copy}"} for row in rows for copy in "ab"]
    subjects = {f"c{i}{copy}": f"p{i}" for i in range(3) for copy in "ab"}
    for one, two in zip(once, robustness_table(copies, subjects=subjects), strict=True):
        assert (two.pop("cases"), two.pop("subjects")) == (6, 3)
        same = {key: value for key, value in one.items() if key in two}
        assert two == pytest.approx(same, nan_ok=True), "two scans of a subject are one piece of evidence"


BOX = (slice(4, 9), slice(3, 11), slice(5, 8))


def one_channel_of_ct_and_mr():
    """Three cases of each modality and a segmenter of one channel that learned from both."""
    archive = MemoryArchive()
    for i, (modality, unit) in enumerate([("CT", "HU")] * 3 + [("MR", "raw")] * 3):
        rest = 0 if modality == "CT" else 200
        scan = bright_cube((14, 13, 12), BOX) + rest
        archive.add_scan(f"s{i}", scan, subject=f"p{i}", modality=modality, unit=unit)
        label = np.roll(scan > rest, 0 if modality == "CT" else 2, axis=0)  # MR is worse to begin with
        archive.add_case(f"c{i}", [f"s{i}"], label.astype(np.uint8))
    archive.set_split(test=tuple(f"p{i}" for i in range(6)))
    return archive, Predictor(Threshold(), card(modalities=("CT",), other_modalities=("MR",)))


def test_a_corruption_counts_only_the_cases_that_it_is_applied_to():
    """120 HU less take the whole cube of a CT: spread over the MR as well, it is half of that."""
    archive, model = one_channel_of_ct_and_mr()
    evaluation = Robustness(parse(Robustness.Config, {"strengths": {"shift": [-120], "blur": [2]}}))
    found = list(evaluation.run(model, archive))
    scores = {score.name: score.value for score in found}
    tables = {s.name: s.per_case for s in found if s.per_case is not None}
    assert {row["case"] for row in tables["shift-1/dice"]} == {"c0", "c1", "c2"}
    assert {row["case"] for row in tables["blur-1/dice"]} == {f"c{i}" for i in range(6)}
    assert (scores["shift-1/undisturbed/dice"], scores["shift-1/dice"]) == (1.0, 0.0)
    assert scores["undisturbed/dice"] == pytest.approx((1.0 + 0.6) / 2)
    assert "blur-1/undisturbed/dice" not in scores

    rows = [row for table in tables.values() for row in table]
    subjects = {f"c{i}": f"p{i}" for i in range(6)}
    table = {
        r["corruption"]: r
        for r in robustness_table(rows, subjects=subjects)
        if (r["class"], r["metric"]) == ("bright", "dice")
    }
    shift = table["shift"]
    assert (shift["cases"], shift["subjects"], shift["one_sided"]) == (3, 3, 0)
    assert (shift["before"], shift["after"], shift["difference"]) == (1.0, 0.0, -1.0)
    assert (table["blur"]["cases"], table[UNDISTURBED]["cases"]) == (6, 6)


def test_what_no_case_is_scanned_with_is_neither_predicted_nor_tested(tmp_path):
    """The segmenter knows MR too, the archive holds CT alone."""
    model, asked = Predictor(Threshold(), card(modalities=("CT",), other_modalities=("MR",))), []

    def progress(title, total):
        asked.append((title, total))
        return lambda case: None

    def written(archive, name):
        write_robustness(
            tmp_path / name, model, archive, sorted(archive.cases), nsd_tolerance_mm=2.0, progress=progress
        )
        return read_rows(tmp_path / name / "robustness.csv")

    tried = {row["corruption"] for row in written(world(), "ct")}
    assert tried == {UNDISTURBED, "noise", "blur", "resolution", "missing_slices", "shift"}
    assert {title.split("-")[0] for title, _ in asked} == tried

    # what an earlier version left of an interrupted call holds every case
    archive, _ = one_channel_of_ct_and_mr()
    old = tmp_path / "mixed" / "robustness_cases" / "shift-1.csv"
    head = {"corruption": "shift", "severity": 1, "amount": 20.0, "unit": "HU", "class": "bright"}
    write_csv(old, [head | {"case": f"c{i}", "dice": 0.5} for i in range(6)], columns=CASE_COLUMNS)
    asked.clear()
    rows = [r for r in written(archive, "mixed") if (r["class"], r["metric"]) == ("bright", "dice")]
    cases = {r["corruption"]: r["cases"] for r in rows}
    assert cases == {UNDISTURBED: 6, "blur": 6, "resolution": 6, "missing_slices": 6} | dict.fromkeys(
        ("noise", "relative_noise", "bias_field", "shift", "scaling"), 3
    )
    assert ("scaling-1", 3) in asked
    assert ("blur-1", 6) in asked


def test_wrong_strengths_are_named():
    with pytest.raises(ConfigError, match=r"no corruption named 'fog'; known: noise"):
        parse(Robustness.Config, {"strengths": {"fog": [1]}})
    with pytest.raises(ConfigError, match=r"blur must be positive numbers, got \[0.0\]"):
        parse(Robustness.Config, {"strengths": {"blur": [0]}})
    with pytest.raises(ConfigError, match="scores a segmenter"):
        next(iter(Robustness(Robustness.Config()).run(object(), world())))  # pyright: ignore[reportArgumentType]
    assert Setting("blur", 2, 4.0, "mm FWHM").name == "blur-2"
