"""Volumes of the viewer: which voxels, which greys, and what a page holds."""

import base64
import gzip
import json
import re
from dataclasses import replace

import numpy as np
import pytest

from medseg_ssl.analysis import viewer as v
from medseg_ssl.analysis import volumes as vol

SPACING = (3.0, 1.0, 2.0)


def ball(shape=(40, 100, 60), centre=(20, 50, 30), radius_mm=9.0):
    place = np.indices(shape).astype(float)
    distance = sum(((p - c) * s) ** 2 for p, c, s in zip(place, centre, SPACING, strict=True))
    return (distance < radius_mm**2).astype(np.uint8)


def volume_of(label, *, voxels=10**9):
    box = vol.box_around(label, SPACING, voxels=voxels)
    image = np.linspace(-200, 300, label.size).reshape(label.shape)
    channel = vol.grey_channel("CT", "HU", box.cut(image), None, limits=(0, 1))
    spacing = tuple(m * s for m, s in zip(SPACING, box.step, strict=True))
    sizes = vol.volumes_ml(label, SPACING, 2)
    return vol.CaseVolume("key", ("background", "or<gan"), (channel,), box.cut(label), spacing, box, sizes)


def test_box_is_the_label_with_a_margin_in_millimetres():
    box = vol.box_around(ball(), SPACING, voxels=10**9)
    assert box.start == (20 - 2 - 9, 50 - 8 - 25, 30 - 4 - 13)
    assert box.shape == (5 + 18, 17 + 50, 9 + 26)
    assert vol.box_around(np.zeros((4, 5, 6), np.uint8), SPACING, voxels=10**9).shape == (4, 5, 6)
    unknown = np.full((4, 5, 6), 255, np.uint8)
    assert vol.box_around(unknown, SPACING, voxels=10**9).shape == (4, 5, 6)


@pytest.mark.parametrize("voxels", [10**9, 20_000, 3_000])
def test_thinning_keeps_within_the_limit_and_does_not_move_the_picture(voxels):
    label = ball()
    box = vol.box_around(label, SPACING, voxels=voxels)
    assert np.prod(box.shape) <= voxels
    affine = np.diag([3.0, 1.0, 2.0, 1.0])
    affine[:3, 3] = (7.0, -5.0, 11.0)
    shown = box.cut(label)
    middles = [
        (a @ np.array([*np.argwhere(which).mean(axis=0), 1.0]))[:3]
        for a, which in ((affine, label), (box.affine(affine), shown))
    ]
    np.testing.assert_allclose(*middles, atol=0.8)
    np.testing.assert_allclose(
        np.linalg.norm(box.affine(affine)[:3, :3], axis=0), np.multiply(SPACING, box.step)
    )


def test_what_lies_outside_of_the_box_is_counted():
    label = ball()
    box = vol.box_around(label, SPACING, voxels=10**9)
    assert box.outside(label) == 0
    label[0, 0, :3] = 1
    assert box.outside(label) == 3


def test_greys_of_ct_are_fine_in_soft_tissue_and_windows_read_them_back():
    hu = np.arange(-200.0, 300.0, 1.0).reshape(5, 10, 10)
    channel = vol.grey_channel("CT", "HU", hu, None, limits=(0, 1))
    back = channel.values_256[channel.image_DHW]
    assert np.abs(back - hu).max() <= 5 / 3 + 1e-9
    shown = v.windowed(channel, channel.image_DHW)
    assert (shown[hu <= -164].max(), shown[hu >= 244].min()) == (0, 255)
    assert abs(int(shown[hu == 40.0][0]) - 128) <= 2


def test_no_data_is_black_and_other_units_are_linear():
    image = np.array([[[0.0, 40.0, 100.0, 1e6]]])
    channel = vol.grey_channel("MR", "raw", image, np.array([[[True, True, True, False]]]), limits=(0, 100))
    assert channel.image_DHW.ravel().tolist() == [0, 102, 255, 0]
    assert channel.unit == ""
    assert channel.window[1] < 101


def test_files_read_back(tmp_path):
    volume = volume_of(ball(), voxels=20_000)
    path = vol.write_volume(tmp_path / "v.npz", volume)
    found = vol.read_volume(path)
    assert (found.case, found.classes, found.box, found.truth_ml) == (
        volume.case,
        volume.classes,
        volume.box,
        pytest.approx(volume.truth_ml),
    )
    np.testing.assert_array_equal(found.channels[0].image_DHW, volume.channels[0].image_DHW)
    assert vol.read_box(path) == volume.box
    predictions = {
        "a": vol.CasePrediction(volume.truth_DHW, 0.5),
        "b": vol.CasePrediction(volume.truth_DHW * 0, 0.0, volume.truth_DHW * 9),
    }
    opened = vol.Predictions.open(vol.write_predictions(tmp_path / "p.npz", predictions))
    assert (set(opened.cases), opened.explained) == ({"a", "b"}, ("b",))
    assert (opened.read("a").outside_ml, opened.read("a").saliency_DHW) == (0.5, None)
    np.testing.assert_array_equal(opened.read("b").saliency_DHW, volume.truth_DHW * 9)
    assert volume.truth_ml[1] == pytest.approx(4 / 3 * np.pi * 0.9**3, rel=0.05)


def test_a_prediction_of_a_class_that_nobody_stated_is_not_wrong(tmp_path):
    label = np.zeros((2, 3, 4), np.uint8)
    label[0, 0] = (0, 1, 1, 255)
    said = label.copy()
    said[0, 0] = (2, 2, 1, 2)  # nobody stated class 2: it may well lie where the label has background
    said[1, 0, 0] = 1
    volume = replace(
        volume_of(label), classes=("background", "a", "b"), truth_DHW=label, known=(True, True, False)
    )
    assert volume.unstated == ("b",)
    assert np.argwhere(volume.wrong(said)).tolist() == [[0, 0, 1], [1, 0, 0]]
    stated = replace(volume, known=())
    assert (stated.unstated, int(stated.wrong(said).sum())) == ((), 3)

    path = vol.write_volume(tmp_path / "v.npz", volume)
    assert vol.read_volume(path).known == (True, True, False)
    tree = json.loads(v.packed(v.ViewedCase("c", volume, {})))
    assert tree["known"] == [True, True, False]
    with np.load(path) as file:
        older = {name: file[name] for name in file.files if name != "known"}
    np.savez_compressed(tmp_path / "older.npz", **older)
    assert vol.read_volume(tmp_path / "older.npz").known == ()


def test_a_page_holds_what_fits_and_says_what_does_not():
    volume = volume_of(ball())
    fit = {("mae", 2): vol.CasePrediction(volume.truth_DHW, 0.25, volume.truth_DHW)}
    cases = [
        v.ViewedCase(name, volume, fit, {("mae", 2): {"mean": 0.5, "or<gan": float("nan")}})
        for name in ("Worst <case>", "Median", "Best")
    ]
    size = len(v.packed(cases[0]))
    assert not v.fill(cases, limit_bytes=4 * size).left_out
    found = v.fill(cases, limit_bytes=int(1.5 * size))
    assert (len(found.cases), list(found.left_out)) == (1, ["Median", "Best"])
    html = v.viewer_html(found, name="x")
    assert "Not shown" in html
    assert "Worst <case>" not in html
    assert "or<gan" not in html
    (tree,) = map(json.loads, re.findall(r'class="case">(.*?)</script>', html))
    assert tree["fits"][0]["dice"] == {"mean": 0.5}
    bytes_ = gzip.decompress(base64.b64decode(tree["truth"]))
    np.testing.assert_array_equal(np.frombuffer(bytes_, np.uint8).reshape(tree["shape"]), volume.truth_DHW)
    assert v.viewer_html(v.fill([], limit_bytes=1), name="x") == ""
