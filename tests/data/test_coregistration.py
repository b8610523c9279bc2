"""Rigid and affine registration of pairs, with known transforms."""

import json

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from medseg_ssl.data.alignment import PairTask
from medseg_ssl.data.coregistration import (
    Coregister,
    CoregisterTask,
    Found,
    check_library,
    pairs_to_register,
    register,
)
from medseg_ssl.data.manifest import PairRow
from medseg_ssl.data.store import write_volume
from tests.data.small_archive import RECIPE, make_archive, scan_row

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
    turn = np.array(found.transform_44)[:3, :3]
    assert np.allclose(turn @ turn.T, np.eye(3), atol=1e-6)


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


@pytest.mark.slow
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


@pytest.mark.slow
def test_what_is_aligned_within_the_error_stays_where_it_is(tmp_path):
    values = body()
    a, b = stored(tmp_path, "a", values), stored(tmp_path, "b", np.where(values > 150, 1100 - values, values))
    found = register(CoregisterTask(PairTask(tmp_path, a, b), Coregister(transform="rigid")))
    assert np.array_equal(found.transform_44, np.eye(4))


@pytest.mark.slow
@pytest.mark.parametrize(("offset_mm", "believed"), [(9.0, True), (0.0, False)])
def test_a_misplaced_pair_must_lie_better_afterwards(tmp_path, monkeypatch, offset_mm, believed):
    from medseg_ssl.data import coregistration
    from medseg_ssl.data.alignment import Alignment

    values = body()
    a, b = (
        stored(tmp_path, "a", values),
        stored(tmp_path, "b", values, moved=rigid((0, 0, 0), (9.0, 0.0, 0.0))),
    )
    monkeypatch.setattr(coregistration, "measure", lambda task: Alignment(0.9, 1.0))
    how = Coregister(transform="rigid", misplaced_mm=4.0)
    found = register(CoregisterTask(PairTask(tmp_path, a, b), how, offset_mm))
    assert (found.transform_44 is not None) == believed


def test_which_pairs_are_registered(tmp_path):
    rows = [scan_row(key, SHAPE) for key in "abcde"]
    pairs = [
        PairRow(scan_a="a", scan_b="b", relation="same_study"),
        PairRow(scan_a="a", scan_b="c", relation="same_subject"),
        PairRow(scan_a="a", scan_b="d", relation="registered", offset_mm=9.0, overlap=0.9),
        PairRow(scan_a="a", scan_b="e", relation="same_frame", offset_mm=2.0, overlap=0.9),
        PairRow(scan_a="b", scan_b="c", relation="same_study", coregistration="refused"),
    ]

    def wanted(**options):
        tasks = pairs_to_register(pairs, rows, Coregister(**options), archive=tmp_path)
        return [(task.pair.scan_a.key + task.pair.scan_b.key, task.offset_mm) for task in tasks]

    assert wanted() == []
    assert wanted(transform="rigid") == [("ab", None)]
    assert wanted(transform="rigid", misplaced_mm=4.0) == [("ab", None), ("ad", 9.0)]


def test_misplaced_needs_the_measure():
    from medseg_ssl.config import ConfigError, parse
    from medseg_ssl.data.prepare import PrepareConfig

    tree = {"source": {"name": "dicom"}, "measure_pairs": False, "coregister": {"misplaced_mm": 4}}
    with pytest.raises(ConfigError, match="misplaced_mm needs measure_pairs"):
        parse(PrepareConfig, tree)


@pytest.fixture
def tried(monkeypatch):
    """Pairs that ``prepare`` gave to a registration that believes the first alone and dies at the one named."""
    from medseg_ssl.data import relating

    class Tried(list):
        dies_at = None

        def register(self, task):
            if len(self) == self.dies_at:
                raise KeyboardInterrupt
            self.append(task)
            eye = tuple(map(tuple, np.eye(4).tolist()))
            return Found(transform_44=eye, overlap=0.9, offset_mm=0.0) if len(self) == 1 else Found()

    tasks = Tried()
    monkeypatch.setattr(relating, "register", tasks.register)
    return tasks


def prepared(tmp_path, **changes):
    from medseg_ssl.data.archive import Archive
    from medseg_ssl.data.prepare import PrepareConfig, prepare
    from tests.data.scans import FOLDER, folder_tree

    if not (tmp_path / "raw").exists():
        folder_tree(tmp_path / "raw", subjects=2)
    tree = {"source": FOLDER, "split": {"test": 0, "development": 0}, "coregister": {"transform": "rigid"}}
    return Archive.open(
        prepare(PrepareConfig.model_validate({**tree, **changes}), [tmp_path / "raw"], tmp_path / "out")
    )


def ways(archive):
    return sorted((p.relation, p.coregistration, p.relation_before) for p in archive.pairs)


def test_prepare_registers_once_and_remembers(tmp_path, tried):
    """A pair without a shared frame becomes same_frame through its transform; one that is refused stays."""
    for _ in range(2):
        archive = prepared(tmp_path)
        assert len(tried) == len(archive.pairs) > 1
        assert ways(archive)[0] == ("same_frame", "rigid", "same_study")
        assert set(ways(archive)[1:]) == {("same_study", "refused", "same_study")}
        assert archive.generation == 1
    notes = json.loads((archive.path / "summary.json").read_text())["notes"]
    assert any(note.startswith("1 pairs brought together (rigid)") for note in notes)
    assert "by rigid registration" in (archive.path / "overview.html").read_text()


def test_registration_goes_on_where_it_was_killed(tmp_path, tried):
    tried.dies_at = 1
    with pytest.raises(KeyboardInterrupt):
        prepared(tmp_path)
    assert len(tried) == 1
    with (tmp_path / "out" / "private" / "registered.jsonl").open("a") as file:
        file.write('["half a li')
    tried.dies_at = None
    archive = prepared(tmp_path)
    assert len(tried) == len(archive.pairs), "the one that was done is not done again"
    assert ways(archive)[0] == ("same_frame", "rigid", "same_study")
    assert not (archive.path / "private" / "registered.jsonl").exists()


def test_registration_can_be_asked_for_later_and_anew(tmp_path, tried):
    archive = prepared(tmp_path, coregister={})
    before = {p: p.stat().st_mtime_ns for p in (archive.path / "volumes").iterdir()}
    assert not tried
    assert {p.coregistration for p in archive.pairs} == {""}
    prepared(tmp_path)
    assert len(tried) == len(archive.pairs)
    prepared(tmp_path, coregister={"transform": "rigid", "accept_mm": 3.0})
    assert len(tried) == 2 * len(archive.pairs), "another question, another answer"
    assert before == {p: p.stat().st_mtime_ns for p in (archive.path / "volumes").iterdir()}


def test_a_pair_whose_worker_dies_is_refused_and_the_others_go_on(tmp_path, monkeypatch):
    from medseg_ssl.data import prepare as module
    from medseg_ssl.fanout import Failure, WorkerDiedError

    def all_die(function, tasks, **options):
        if function.__name__ == "register":
            return [Failure(i, WorkerDiedError("died")) for i in range(len(tasks))]
        return run(function, tasks, **options)

    run = module._run
    monkeypatch.setattr(module, "_run", all_die)
    assert {p.coregistration for p in prepared(tmp_path).pairs} == {"refused"}


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
