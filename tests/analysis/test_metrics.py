"""Metrics against MONAI, hand-made shapes and the rules for absent and unknown classes."""

from __future__ import annotations

import time

import numpy as np
import pytest

from medseg_ssl.analysis.metrics import case_means, case_metrics, summarize, wilson_interval

CLASSES = ("background", "a", "b")


def ball(shape, centre, radius_mm, spacing=(1.0, 1.0, 1.0)):
    grid = np.meshgrid(*[np.arange(n) * s for n, s in zip(shape, spacing, strict=True)], indexing="ij")
    return sum((g - c) ** 2 for g, c in zip(grid, centre, strict=True)) <= radius_mm**2


def rows_of(prediction, label, spacing=(1.0, 1.0, 1.0), tolerance=1.0, known=(), classes=CLASSES):
    rows = case_metrics(
        prediction, label, spacing_mm=spacing, classes=classes, nsd_tolerance_mm=tolerance, known=known
    )
    return {row["class"]: row for row in rows}


def test_equal_maps_are_perfect():
    label = ball((20, 20, 20), (10, 10, 10), 6).astype(np.uint8)
    row = rows_of(label, label)["a"]
    assert [row[k] for k in ("dice", "iou", "nsd", "precision", "recall")] == [1.0] * 5
    assert row["hd95_mm"] == 0.0


def test_shifted_cube_by_hand():
    label = np.zeros((20, 20, 20), np.uint8)
    label[5:9, 5:9, 5:9] = 1
    prediction = np.roll(label, 2, axis=0)
    row = rows_of(prediction, label, spacing=(3.0, 1.0, 1.0), tolerance=5.9)["a"]
    assert row["dice"] == pytest.approx(0.5)
    assert row["iou"] == pytest.approx(1 / 3)
    assert row["precision"] == row["recall"] == pytest.approx(0.5)
    # of 56 surface voxels: the outer cap (2 x 2 inner voxels) is far from the other cube's inner cap
    assert row["hd95_mm"] == pytest.approx(6.0)


def test_tolerance_counts_surface_voxels():
    label = np.zeros((9, 9, 9), np.uint8)
    prediction = label.copy()
    label[4, 4, 4] = 1
    prediction[4, 4, 6] = 1
    for tolerance, nsd in ((0.99, 0.0), (1.0, 1.0)):
        row = rows_of(prediction, label, spacing=(1.0, 1.0, 0.5), tolerance=tolerance)["a"]
        assert row["nsd"] == nsd
        assert row["hd95_mm"] == pytest.approx(1.0)


@pytest.mark.parametrize("seed", range(4))
def test_agrees_with_monai(seed):
    import torch
    from monai.metrics import (
        compute_dice,
        compute_hausdorff_distance,
        compute_iou,
        compute_surface_dice,
    )

    rng = np.random.default_rng(seed)
    spacing = tuple(rng.uniform(0.6, 3.0, 3))
    shape = (24, 31, 27)
    extent = np.array(shape) * spacing
    label, prediction = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)
    for value in (1, 2):
        # some touch the border, where a surface is easily lost
        centre = rng.uniform(0.1, 0.9, 3) * extent
        label[ball(shape, centre, 9, spacing)] = value
        prediction[ball(shape, centre + rng.normal(0, 2, 3), 10, spacing)] = value
    rows = rows_of(prediction, label, spacing, tolerance=2.0)

    def onehot(volume):
        return torch.stack([torch.from_numpy(volume == k) for k in range(3)])[None].float()

    nsd = compute_surface_dice(
        onehot(prediction), onehot(label), class_thresholds=[2.0, 2.0], spacing=spacing
    )
    hd = compute_hausdorff_distance(onehot(prediction), onehot(label), percentile=95, spacing=spacing)
    dice = compute_dice(onehot(prediction), onehot(label), include_background=False)
    iou = compute_iou(onehot(prediction), onehot(label), include_background=False)
    for k, name in enumerate(CLASSES[1:]):
        assert rows[name]["dice"] == pytest.approx(float(dice[0, k]), abs=1e-6)
        assert rows[name]["iou"] == pytest.approx(float(iou[0, k]), abs=1e-6)
        assert rows[name]["nsd"] == pytest.approx(float(nsd[0, k]), abs=1e-6)
        assert rows[name]["hd95_mm"] == pytest.approx(float(hd[0, k]), rel=1e-5)


def test_absent_in_both_is_empty_and_absent_in_one_is_worst():
    label = np.zeros((4, 5, 6), np.uint8)
    prediction = label.copy()
    prediction[1, 1, 1] = 1
    rows = rows_of(prediction, label, spacing=(1.0, 2.0, 3.0))
    assert all(rows["b"][k] is None for k in ("dice", "iou", "nsd", "hd95_mm", "precision", "recall"))
    assert [rows["a"][k] for k in ("dice", "iou", "nsd", "precision", "recall")] == [0.0] * 5
    assert rows["a"]["hd95_mm"] == pytest.approx(np.sqrt(4**2 + 10**2 + 18**2))
    assert rows_of(label, prediction, spacing=(1.0, 2.0, 3.0))["a"] == rows["a"]


def test_class_unknown_in_the_case_is_empty():
    label = np.zeros((4, 4, 4), np.uint8)
    prediction = np.full_like(label, 2)
    assert rows_of(prediction, label, known=(True, True, False))["b"]["dice"] is None
    assert rows_of(prediction, label, known=(True, True, True))["b"]["dice"] == 0.0


def test_unknown_voxels_enter_nothing():
    label = np.zeros((20, 20, 20), np.uint8)
    label[4:12, 4:12, 4:12] = 1
    prediction = label.copy()
    prediction[12:16, 4:12, 4:12] = 1
    assert rows_of(prediction, label)["a"]["dice"] < 1
    label[12:, :, :] = 255
    row = rows_of(prediction, label, tolerance=0.0)["a"]
    assert (row["dice"], row["nsd"], row["hd95_mm"], row["precision"]) == (1.0, 1.0, 0.0, 1.0)


@pytest.mark.parametrize("off", [-3e-8, 0.0, 3e-8])
def test_a_headers_rounding_does_not_decide_what_is_tolerated(off):
    label, prediction = np.zeros((12, 12, 12), np.uint8), np.zeros((12, 12, 12), np.uint8)
    label[2:10, 2:10, 2:10] = 1
    prediction[4:10, 2:10, 2:10] = 1
    row = rows_of(prediction, label, spacing=(1 + off, 1 + off, 1 + off), tolerance=2.0)["a"]
    assert row["nsd"] == 1.0


def test_border_to_unknown_voxels_is_no_surface():
    label = np.zeros((12, 12, 12), np.uint8)
    label[:6] = 1
    label[6:] = 255
    prediction = np.zeros_like(label)
    prediction[:5] = 1
    row = rows_of(prediction, label, tolerance=0.5)["a"]
    # the truth ends where nobody knows: its last plane is a surface at the volume's border only (44 side voxels),
    # while the prediction's last plane is one whole; those 44 and its 100 inner ones lie a voxel off
    surface_truth, surface_prediction = 144 + 5 * 44, 144 + 3 * 44 + 144
    within_truth, within_prediction = surface_truth - 44, surface_prediction - 100
    expected = (within_truth + within_prediction) / (surface_truth + surface_prediction)
    assert row["nsd"] == pytest.approx(expected)
    assert row["recall"] == pytest.approx(5 / 6)


def test_wrong_arguments_name_the_value():
    label = np.zeros((4, 4, 4), np.uint8)
    with pytest.raises(ValueError, match=r"\(4, 4, 3\)"):
        rows_of(label[..., :3], label)
    with pytest.raises(ValueError, match="spacing_mm"):
        rows_of(label, label, spacing=(1.0, 0.0, 1.0))
    with pytest.raises(ValueError, match="tolerance"):
        rows_of(label, label, tolerance=-1.0)


def test_means_are_over_classes_then_cases():
    rows = [
        {"case": "x", "dice": 1.0},
        {"case": "x", "dice": 0.0},
        {"case": "y", "dice": 1.0},
        {"case": "y", "dice": None},
        {"case": "z", "dice": None},
    ]
    assert case_means(rows, "dice") == {"x": 0.5, "y": 1.0}
    assert summarize(rows, ("dice",))["dice"]["mean"] == 0.75
    assert summarize(rows, ("dice",))["dice"]["cases"] == 2


def test_wilson_interval_stays_inside():
    low, high = wilson_interval(10, 10)
    assert (round(low, 3), high) == (0.722, 1.0)
    low, high = wilson_interval(5, 10)
    assert (round(low, 3), round(high, 3)) == (0.237, 0.763)
    with pytest.raises(ValueError, match="trials"):
        wilson_interval(1, 0)


def test_two_classes_of_a_hippocampus_sized_case_take_milliseconds():
    label = np.zeros((35, 50, 36), np.uint8)
    label[ball(label.shape, (17, 18, 18), 8)] = 1
    label[ball(label.shape, (17, 34, 18), 8)] = 2
    prediction = np.roll(label, 1, axis=1)
    rows_of(prediction, label)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        rows_of(prediction, label)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.02  # 3 ms on an idle core; the margin is for a busy machine
