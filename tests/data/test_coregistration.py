"""Rigid and affine registration of pairs, with known transforms."""

import json

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from medseg_ssl.data.alignment import Alignment, PairTask
from medseg_ssl.data.coregistration import Coregister, CoregisterTask, check_library, register
from medseg_ssl.data.manifest import PairRow
from medseg_ssl.data.store import write_volume
from tests.data.small_archive import RECIPE, make_archive, scan_row

SimpleITK = pytest.importorskip("SimpleITK", reason="the extra 'registration' (SimpleITK) is not installed")

SHAPE, SPACING = (44, 60, 52), (3.0, 2.0, 2.0)


def rigid(degrees_zyx, shift_xyz_mm, *, about=(40.0, 65.0, 160.0)):
    """A turn about a point, then a shift, as a matrix on (x, y, z) millimetres."""
    a, b, c = np.deg2rad(degrees_zyx)
    z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    y = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    x = np.array([[1, 0, 0], [0, np.cos(c), -np.sin(c)], [0, np.sin(c), np.cos(c)]])
    out = np.eye(4)
    out[:3, :3] = z @ y @ x
    out[:3, 3] = np.array(about) - out[:3, :3] @ about + shift_xyz_mm
    return out


def body(seed=0):
    """A body with organs of several sizes, values 0 to about 1000, unlike its mirror images."""
    generator = np.random.default_rng(seed)
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in SHAPE), indexing="ij")
    volume = 300.0 * ((z**2 / 0.7 + y**2 / 0.4 + (x - 0.3 * y) ** 2 / 0.6) < 1)
    for _ in range(14):
        at, size = generator.uniform(-0.5, 0.5, 3), generator.uniform(0.1, 0.3)
        ball = (z - at[0]) ** 2 + (y - at[1]) ** 2 + (x - at[2]) ** 2 < size**2
        volume[ball & (volume > 0)] = generator.uniform(150, 900)
    return gaussian_filter(volume, 1.0) + generator.normal(0, 8, SHAPE)


def stored(tmp_path, key, values, moved=None):
    row = scan_row(key, SHAPE, spacing_mm=SPACING, threshold=100.0)
    if moved is not None:
        row = row.moved(moved)
    (tmp_path / "volumes").mkdir(exist_ok=True)
    write_volume(tmp_path, values.astype(np.int16), row, recipe=RECIPE, stamp="")
    return row


def worst(found, truth, row):
    """Largest distance (mm) over a scan's corners between a transform and the true one."""
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in row.shape], indexing="ij")).reshape(3, -1)
    places = np.array(row.affine_44) @ np.vstack([corners, np.ones(8)])
    return np.linalg.norm(((np.array(found) - truth) @ places)[:3], axis=0).max()


@pytest.mark.parametrize(
    "away",
    [
        rigid((8, -5, 6), (18.0, -12.0, 9.0)),
        pytest.param(rigid((0, 0, 0), (250.0, -130.0, 400.0)), marks=pytest.mark.slow),
    ],
)
def test_a_known_rigid_transform_between_two_modalities(tmp_path, away):
    values = body()
    a = stored(tmp_path, "a", values)
    b = stored(tmp_path, "b", np.where(values > 150, 1100 - values, values), moved=away)
    how = Coregister(transform="rigid")
    found = register(CoregisterTask(PairTask(tmp_path, a, b), how))
    assert found.transform_44 is not None
    assert worst(found.transform_44, np.linalg.inv(away), b) < 1.5, "millimetres at the corners"
    assert np.allclose(found.transform_44[:3, :3] @ found.transform_44[:3, :3].T, np.eye(3), atol=1e-6)


@pytest.mark.slow
def test_a_known_affine_transform(tmp_path):
    stretch = rigid((4, 0, -3), (6.0, -5.0, 8.0)) @ np.diag([1.06, 0.95, 1.04, 1.0])
    values = body()
    a, b = stored(tmp_path, "a", values), stored(tmp_path, "b", values, moved=stretch)
    found = register(CoregisterTask(PairTask(tmp_path, a, b), Coregister(transform="affine")))
    assert found.transform_44 is not None
    assert worst(found.transform_44, np.linalg.inv(stretch), b) < 2.5
    again = register(CoregisterTask(PairTask(tmp_path, a, b), Coregister(transform="affine")))
    assert np.array_equal(again.transform_44, found.transform_44)


def test_two_different_parts_of_a_body_are_refused(tmp_path):
    _, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in SHAPE), indexing="ij")
    limbs = sum(500.0 * ((y - at) ** 2 + (x + at / 2) ** 2 < 0.06) for at in (-0.5, 0.4))
    a = stored(tmp_path, "a", body())
    b = stored(tmp_path, "b", gaussian_filter(limbs, 1.0) + np.random.default_rng(1).normal(0, 8, SHAPE))
    assert (
        register(CoregisterTask(PairTask(tmp_path, a, b), Coregister(transform="rigid"))).transform_44 is None
    )


def test_an_empty_scan_is_refused(tmp_path):
    a, b = stored(tmp_path, "a", body()), stored(tmp_path, "b", np.zeros(SHAPE))
    assert (
        register(CoregisterTask(PairTask(tmp_path, a, b), Coregister(transform="rigid"))).transform_44 is None
    )


def test_prepare_registers_once_and_remembers(tmp_path, monkeypatch):
    """A pair without a shared frame becomes same_frame through its transform; one that is refused stays."""
    from medseg_ssl.data import relating
    from medseg_ssl.data.archive import Archive
    from medseg_ssl.data.coregistration import Found
    from medseg_ssl.data.prepare import PrepareConfig, prepare
    from tests.data.scans import FOLDER, folder_tree

    folder_tree(tmp_path / "raw", subjects=2)
    tried = []

    def fake(task):
        """Believed for the first pair alone."""
        tried.append(task)
        return Found(np.eye(4), Alignment(0.9, 0.0)) if len(tried) == 1 else Found()

    monkeypatch.setattr(relating, "register", fake)
    tree = {"source": FOLDER, "split": {"test": 0, "development": 0}, "coregister": {"transform": "rigid"}}
    config = PrepareConfig.model_validate(tree)
    for _ in range(2):
        archive = Archive.open(prepare(config, [tmp_path / "raw"], tmp_path / "out"))
        assert len(tried) == len(archive.pairs) > 1
        ways = sorted((p.relation, p.coregistration, p.transform_44 is None) for p in archive.pairs)
        assert ways[0] == ("same_frame", "rigid", False)
        assert set(ways[1:]) == {("same_study", "refused", True)}
    notes = json.loads((archive.path / "summary.json").read_text())["notes"]
    assert any(note.startswith("1 pairs registered (rigid)") for note in notes)


def test_crops_of_a_registered_pair_show_the_same_place(tmp_path):
    """The view's affine is the first scan's frame, so one point of the body has one place in both crops."""
    from medseg_ssl.data.loader import Loader
    from medseg_ssl.types import ViewSpec

    values, away = body(), rigid((8, -5, 6), (18.0, -12.0, 9.0))
    a = scan_row("a", SHAPE, spacing_mm=SPACING, threshold=100.0, modality="CT")
    b = scan_row("b", SHAPE, spacing_mm=SPACING, threshold=100.0, modality="MR").moved(away)
    back = tuple(map(tuple, np.linalg.inv(away).tolist()))
    volumes = [(a, values), (b, values)]
    pair = PairRow(scan_a="a", scan_b="b", relation="same_frame", coregistration="rigid", transform_44=back)
    turned = PairRow(
        scan_a="b",
        scan_b="a",
        relation="same_frame",
        coregistration="rigid",
        transform_44=tuple(map(tuple, away.tolist())),
    )
    plan = {"pair": ViewSpec(size=(16, 20, 20), count=2, pair="same_box", augment="none")}
    batches = []
    for name, row in (("one", pair), ("two", turned)):
        archive = make_archive(tmp_path / name, volumes, pairs=[row])
        (batch,) = Loader(archive, plan, batch_size=4, steps=1, seed=3, relations=("same_frame",))
        batches.append(batch)
        first, second = batch.views["pair"]
        for i in range(4):
            mapping = (
                np.linalg.inv(second.affine_B44[i].double().numpy()) @ first.affine_B44[i].double().numpy()
            )
            index = np.argwhere(first.valid_BDHW[i].numpy())
            at = index @ mapping[:3, :3].T + mapping[:3, 3]
            near = np.round(at).astype(int)
            inside = (near >= 0).all(axis=1) & (near < second.valid_BDHW.shape[1:]).all(axis=1)
            assert inside.mean() > 0.1
            one = first.image_BCDHW[i, 0].numpy()[tuple(index[inside].T)]
            other = second.image_BCDHW[i, 0].numpy()[tuple(near[inside].T)]
            assert np.corrcoef(one, other)[0, 1] > 0.9
    for one, other in zip(batches[0].views["pair"], batches[1].views["pair"], strict=True):
        assert np.allclose(one.affine_B44, other.affine_B44), "whichever scan the row names first"


def test_without_the_library_it_says_so_at_once(monkeypatch):
    import sys

    from medseg_ssl.config import UserError

    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    check_library(Coregister())
    with pytest.raises(UserError, match="registration"):
        check_library(Coregister(transform="rigid"))
