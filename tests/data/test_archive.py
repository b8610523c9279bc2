import json
import multiprocessing
import os
import pickle
import stat

import numpy as np
import pytest

from medseg_ssl.config import Block, ConfigError, UserError, parse
from medseg_ssl.data import intensity, store
from medseg_ssl.data.archive import Archive
from medseg_ssl.data.archive_writer import ArchiveWriter
from medseg_ssl.data.budgets import make_split
from medseg_ssl.data.manifest import CaseRow, PairRow, ScanRow
from medseg_ssl.data.recipe import Recipe

RECIPE = Recipe(source=Block(name="folder"))
CLASSES = ("background", "organ")
SHAPE = (70, 50, 40)


def ramp(shape=SHAPE):
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape) % 3001 - 1024


def scan_row(key, subject, array, quantised, *, modality="CT", unit="HU"):
    valid = np.ones(array.shape, dtype=bool)
    return ScanRow(
        key=key,
        subject=subject,
        study=f"study-{subject}",
        modality=modality,
        contrast="",
        unit=unit,
        shape=array.shape,
        spacing_mm=(1, 1, 1),
        affine_44=tuple(map(tuple, np.eye(4))),
        frame="",
        scale=quantised.scale,
        offset=quantised.offset,
        content_hash=key * 4,
        original_shape=array.shape,
        original_spacing_mm=(1, 1, 1),
        foreground_box=((0, 0, 0), array.shape),
        statistics=intensity.statistics(array, valid, modality=modality, unit=unit),
    )


def add(writer, name, *, labeled=True, modality="CT", unit="HU", stamp="1"):
    array = ramp()
    stored = store.quantise(array, None, unit=unit)
    key = writer.key(f"scan:{name}")
    row = scan_row(key, writer.key(f"subject:{name}"), array, stored, modality=modality, unit=unit)
    store.write_volume(writer.path, stored.stored, row, recipe=writer.recipe, stamp=stamp)
    case = writer.key(f"case:{name}")
    if labeled:
        label = (array > 500).astype(np.uint8)
        own = label[::2].copy()
        affine = np.diag([2.0, 1, 1, 1])
        store.write_label(
            writer.path,
            case,
            label,
            original_DHW=own,
            original_affine_44=affine,
            recipe=writer.recipe,
            stamp=stamp,
        )
    known = (True, True) if labeled else ()
    return row, CaseRow(case=case, subject=row.subject, scans=(key,), labeled=labeled, known_classes=known)


def build(path, names=("a", "b", "c", "d"), recipe=RECIPE):
    writer = ArchiveWriter.open(path, recipe, CLASSES)
    rows, cases = zip(*(add(writer, name) for name in names), strict=True)
    split = make_split({r.subject: r.content_hash for r in rows}, seed=0, test=1, development=1)
    archive = writer.commit(
        rows,
        cases,
        [],
        splits=[split],
        sources={r.key: f"/secret/{n}" for r, n in zip(rows, names, strict=True)},
    )
    return writer, archive


@pytest.fixture
def built(tmp_path):
    return build(tmp_path / "archive")


# -- voxels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "start", [(0, 0, 0), (3, 40, 7), (-5, -6, -7), (60, 45, 30), (-90, 0, 0), (68, 0, -3)]
)
def test_boxes_equal_a_padded_volume(built, start):
    _, archive = built
    size = (16, 20, 64)
    key, case = next(iter(archive.scans)), next(iter(archive.cases))
    padded = np.pad(ramp(), 100, constant_values=store.NO_DATA)
    place = tuple(slice(100 + s, 100 + s + n) for s, n in zip(start, size, strict=True))
    box = archive.read(key, start, size)
    assert box.dtype == np.int16
    np.testing.assert_array_equal(box, padded[place])
    label = archive.read_label(case, start, size)
    assert label.dtype == np.uint8
    np.testing.assert_array_equal(label, (padded[place] > 500))


def test_original_label_keeps_its_grid(built):
    _, archive = built
    case = next(iter(archive.cases))
    label, affine = archive.original_label(case)
    np.testing.assert_array_equal(label, ramp()[::2] > 500)
    np.testing.assert_array_equal(affine, np.diag([2.0, 1, 1, 1]))
    assert archive.original_spacing_mm(case) == (2.0, 1.0, 1.0)


def test_equal_label_grids_are_stored_once(tmp_path):
    writer = ArchiveWriter.open(tmp_path / "a", RECIPE, CLASSES)
    label = (ramp() > 500).astype(np.uint8)
    store.write_label(
        writer.path, "c", label, original_DHW=label, original_affine_44=np.eye(4), recipe=RECIPE, stamp="s"
    )
    first, second = (writer.path / "labels" / n for n in ("c.b2nd", "c.original.b2nd"))
    assert first.stat().st_ino == second.stat().st_ino
    assert store.finished_label(writer.path, "c", recipe=RECIPE, stamp="s")
    np.testing.assert_array_equal(store.open_array(first)[...], label)


def test_whole_hu_are_exact():
    array = ramp()
    valid = array < 1500
    out = store.quantise(array, valid, unit="HU")
    assert (out.scale, out.offset, out.clipped) == (1.0, 0.0, False)
    np.testing.assert_array_equal(out.stored[valid], array[valid])
    assert (out.stored[~valid] == store.NO_DATA).all()
    high = store.quantise(np.array([[[-1024.0, 40000.0]]], np.float32), None, unit="HU")
    assert high.clipped
    assert high.stored.max() == 32767


@pytest.mark.parametrize("factor", [1e-4, 0.37, 1.0, 1e5])
def test_fractional_values_lose_little(factor):
    rng = np.random.default_rng(0)
    array = (np.abs(rng.normal(500, 120, size=(20, 30, 40))) * factor).astype(np.float32)
    array[0] = 0
    out = store.quantise(array, None, unit="raw")
    back = out.stored * out.scale + out.offset
    assert np.abs(back - array).max() <= out.scale * 0.51
    assert out.scale < array.std() / 500
    assert (back[0] == 0).all()
    assert not out.clipped


def test_whole_raw_values_are_exact_and_outliers_do_not_cost_resolution():
    array = np.arange(60000, dtype=np.float32).reshape(20, 30, 100) % 4096
    assert store.quantise(array, None, unit="raw", integral=True).scale == 1.0
    array[0, 0, 0] = 1e9
    out = store.quantise(array, None, unit="raw", integral=True)
    assert out.clipped
    back = out.stored * out.scale + out.offset
    assert np.abs(back - array)[array < 1e6].max() < 0.5
    assert out.stored.min() > store.NO_DATA
    shifted = store.quantise(
        np.linspace(1e5, 1.1e5, 1000, dtype=np.float32).reshape(10, 10, 10), None, unit="raw"
    )
    assert shifted.offset > 9e4
    with pytest.raises(ValueError, match="no valid voxel"):
        store.quantise(array, np.zeros(array.shape, bool), unit="raw")


def test_finished_work_is_recognised(built):
    writer, archive = built
    row, case = next(iter(archive.scans.values())), next(iter(archive.cases))
    assert store.finished_scan(writer.path, row.key, recipe=RECIPE, stamp="1").key == row.key
    assert store.finished_label(writer.path, case, recipe=RECIPE, stamp="1")
    other = Recipe(source=Block(name="folder"), spacing_mm=(1, 1, 2))
    assert store.finished_scan(writer.path, row.key, recipe=other, stamp="1") is None
    assert store.finished_scan(writer.path, row.key, recipe=RECIPE, stamp="2") is None
    assert store.finished_scan(writer.path, "unknown", recipe=RECIPE, stamp="1") is None
    file = writer.path / "volumes" / f"{row.key}.b2nd"
    file.write_bytes(file.read_bytes()[:500])
    assert store.finished_scan(writer.path, row.key, recipe=RECIPE, stamp="1") is None
    with pytest.raises(UserError, match=r"prepare again"):
        archive.read(row.key, (0, 0, 0), (8, 8, 8))


def test_split_and_policy_do_not_redo_volumes():
    changed = RECIPE.model_copy(update={"drop_duplicates": True})
    assert changed.voxel_hash() == RECIPE.voxel_hash()
    assert Recipe(source=Block(name="folder"), order=1).voxel_hash() != RECIPE.voxel_hash()


def test_full_disk_leaves_nothing_half_written(built, monkeypatch):
    writer, archive = built
    row = next(iter(archive.scans.values()))
    before = sorted(p.name for p in (writer.path / "volumes").iterdir())

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device; free some"):
        store.write_volume(writer.path, np.zeros((4, 4, 4), np.int16), row, recipe=RECIPE, stamp="9")
    with pytest.raises(UserError, match="No space left"):
        writer.commit([], [], [])
    monkeypatch.undo()
    assert sorted(p.name for p in (writer.path / "volumes").iterdir()) == before
    assert Archive.open(writer.path).fingerprint == archive.fingerprint


@pytest.mark.parametrize("renames", range(9))
def test_a_commit_that_was_killed_is_finished_or_undone(built, monkeypatch, renames):
    writer, archive = built
    row, case = add(writer, "e")
    done = []

    def killed(source, target):
        if len(done) == renames:
            raise KeyboardInterrupt
        done.append(target)
        return replace(source, target)

    replace = os.replace
    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        writer.commit([*writer.scans.values(), row], [*writer.cases.values(), case], [])
    monkeypatch.undo()
    # three files are staged by a rename each, archive.json as the last; then all six move in
    again = ArchiveWriter.open(writer.path, RECIPE, CLASSES)
    assert again.generation == (2 if renames > 2 else 1)
    assert len(Archive.open(writer.path).scans) == len(archive.scans) + (renames > 2)
    assert not (writer.path / ".next").exists()


def _checksum(archive, key, queue):
    queue.put(int(archive.read(key, (1, 2, 3), (40, 30, 20)).astype(np.int64).sum()))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_read_the_same(built, method):
    _, archive = built
    key = next(iter(archive.scans))
    expected = int(archive.read(key, (1, 2, 3), (40, 30, 20)).astype(np.int64).sum())
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    worker = context.Process(target=_checksum, args=(archive, key, queue))
    worker.start()
    assert queue.get(timeout=60) == expected
    worker.join(10)


def test_rows_travel_unchanged_and_share_the_note_of_their_fields(built):
    """Of a million rows each with a set of its own, two fifths of the memory would be those sets."""
    _, archive = built
    for kind in (archive.scans, archive.cases):
        first, *others = kind.values()
        again, moved = pickle.loads(pickle.dumps(first)), first.model_copy(update={"subject": "other"})
        assert again == first
        assert (moved.subject, first.subject) == ("other", again.subject)
        note = first.__pydantic_fields_set__
        assert all(row.__pydantic_fields_set__ is note for row in (again, moved, *others))
    assert first.model_dump(exclude_unset=True) == first.model_dump()


def test_what_a_killed_worker_left_is_swept(built):
    writer, archive = built
    left = writer.path / "volumes" / ".abc.b2nd.12345.part"
    left.write_bytes(b"half")
    ArchiveWriter.open(writer.path, RECIPE, CLASSES)
    assert not left.exists()
    assert len(list((writer.path / "volumes").iterdir())) == len(archive.scans)


@pytest.mark.parametrize("name", ["manifest.jsonl", "cases.jsonl", "pairs.jsonl"])
def test_a_commit_killed_in_the_middle_of_its_rows_is_undone(built, monkeypatch, name):
    from medseg_ssl.data import archive_writer

    writer, archive = built
    row, case = add(writer, "e")

    def killed(path, rows):
        if path.name == name:
            path.write_text("{")
            raise KeyboardInterrupt
        return write(path, rows)

    write = archive_writer._write_rows
    monkeypatch.setattr(archive_writer, "_write_rows", killed)
    with pytest.raises(KeyboardInterrupt):
        writer.commit([*writer.scans.values(), row], [*writer.cases.values(), case], [])
    monkeypatch.undo()
    assert ArchiveWriter.open(writer.path, RECIPE, CLASSES).generation == 1
    assert Archive.open(writer.path).fingerprint == archive.fingerprint


def test_pickled_archive_holds_no_files(built):
    _, archive = built
    key = next(iter(archive.scans))
    archive.read(key, (0, 0, 0), (8, 8, 8))
    again = pickle.loads(pickle.dumps(archive))
    assert not again._files
    np.testing.assert_array_equal(
        again.read(key, (0, 0, 0), (8, 8, 8)), archive.read(key, (0, 0, 0), (8, 8, 8))
    )


def test_unknown_keys(built):
    _, archive = built
    with pytest.raises(KeyError, match="no scan 'x'"):
        archive.read("x", (0, 0, 0), (1, 1, 1))
    with pytest.raises(KeyError, match="no labeled case 'x'"):
        archive.read_label("x", (0, 0, 0), (1, 1, 1))


# -- rows ------------------------------------------------------------------------------------------------------------


def test_open_gives_back_what_was_committed(built):
    writer, archive = built
    again = Archive.open(writer.path)
    assert again.scans == archive.scans
    assert again.cases == archive.cases
    assert again.recipe == RECIPE
    assert again.classes == CLASSES
    assert (again.fingerprint, again.generation) == (archive.fingerprint, 1)
    assert set(again.split().train) <= {r.subject for r in again.scans.values()}
    facts = again.facts()
    assert (facts.channels, facts.classes, facts.modalities) == (1, CLASSES, ("CT",))
    key = next(iter(again.scans))
    assert again.linear(key).low == -1000
    assert set(again.intensity) == {"CT"}


def test_raw_pet_gets_a_robust_policy(tmp_path):
    writer = ArchiveWriter.open(tmp_path / "a", RECIPE)
    rows, cases = zip(*(add(writer, n, labeled=False, modality="PT", unit="raw") for n in "ab"), strict=True)
    archive = writer.commit(rows, cases, [])
    assert archive.intensity["PT"].kind == "robust_zscore"
    assert archive.facts().classes == ()


def test_generations_grow_with_content_only(tmp_path):
    writer, archive = build(tmp_path / "a")
    _, same = build(tmp_path / "a")
    assert (same.generation, same.fingerprint) == (1, archive.fingerprint)
    writer = ArchiveWriter.open(tmp_path / "a", RECIPE, CLASSES)
    row, case = add(writer, "e")
    grown = writer.commit([*writer.scans.values(), row], [*writer.cases.values(), case], [])
    assert grown.generation == 2
    assert grown.fingerprint != archive.fingerprint
    assert grown.scans[row.key].generation == 2
    assert {r.generation for k, r in grown.scans.items() if k != row.key} == {1}
    assert (tmp_path / "a" / "splits" / "default.json").is_file()


def test_fingerprint_is_free_of_the_salt(tmp_path):
    prints = set()
    for name in "xy":
        writer = ArchiveWriter.open(tmp_path / name, RECIPE, CLASSES)
        row, case = add(writer, "a")
        row = row.model_copy(update={"content_hash": "same"})
        prints.add(writer.commit([row], [case], []).fingerprint)
    assert len(prints) == 1


def test_only_the_private_file_knows_paths(built):
    writer, _ = built
    private = writer.path / "private" / "sources.csv"
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    assert stat.S_IMODE(private.parent.stat().st_mode) == 0o700
    assert "/secret/a" in private.read_text()
    assert writer.salt in private.read_text()
    for path in writer.path.rglob("*"):
        if path.is_file() and path.parent.name != "private":
            content = path.read_bytes()
            assert b"secret" not in content, path
            assert writer.salt.encode() not in content, path


def test_other_recipe_is_refused_with_the_difference(built):
    writer, _ = built
    other = Recipe(source=Block(name="folder"), spacing_mm=(1, 1, 2))
    with pytest.raises(
        ConfigError, match=r"another recipe \(spacing_mm: None there, \[1.0, 1.0, 2.0\] now\)"
    ):
        ArchiveWriter.open(writer.path, other, CLASSES)
    with pytest.raises(ConfigError, match="classes"):
        ArchiveWriter.open(writer.path, RECIPE, ("background", "tumor"))


def test_interrupted_first_run_goes_on_with_its_keys(tmp_path):
    first = ArchiveWriter.open(tmp_path / "a", RECIPE, CLASSES)
    row, _ = add(first, "a")
    second = ArchiveWriter.open(tmp_path / "a", RECIPE, CLASSES)
    assert second.key("scan:a") == row.key
    assert store.finished_scan(second.path, row.key, recipe=RECIPE, stamp="1") == row
    with pytest.raises(ConfigError, match="order"):
        ArchiveWriter.open(tmp_path / "a", Recipe(source=Block(name="folder"), order=1), CLASSES)
    with pytest.raises(UserError, match="is not an archive"):
        Archive.open(tmp_path / "a")


def test_what_is_no_archive(tmp_path):
    with pytest.raises(UserError, match=r"not an archive \(no such folder\); make one"):
        Archive.open(tmp_path / "missing")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"no archive\.json"):
        Archive.open(tmp_path / "other")
    with pytest.raises(UserError, match="exists and is no archive"):
        ArchiveWriter.open(tmp_path / "other", RECIPE)


def test_damage_is_told(built):
    writer, _ = built
    head = writer.path / "archive.json"
    content = head.read_text()
    with (writer.path / "manifest.jsonl").open("a") as file:
        file.write("{}\n")
    with pytest.raises(UserError, match=r"manifest\.jsonl does not belong to archive\.json"):
        Archive.open(writer.path)
    (writer.path / "manifest.jsonl").unlink()
    with pytest.raises(UserError, match=r"cannot read .*manifest"):
        Archive.open(writer.path)
    head.write_text(content[:40])
    with pytest.raises(UserError, match="cannot read"):
        Archive.open(writer.path)
    head.write_text(json.dumps({"format": 99}))
    with pytest.raises(UserError, match="format 99"):
        Archive.open(writer.path)


def test_rows_that_do_not_fit_are_refused(built):
    writer, archive = built
    scans, cases = list(archive.scans.values()), list(archive.cases.values())
    with pytest.raises(UserError, match="which its subject does not have"):
        writer.commit(scans[1:], cases, [])
    with pytest.raises(UserError, match="not of one subject"):
        writer.commit(
            scans, cases, [PairRow(scan_a=scans[0].key, scan_b=scans[1].key, relation="same_study")]
        )
    with pytest.raises(UserError, match="same key"):
        writer.commit([*scans, scans[0]], cases, [])
    wrong = cases[0].model_copy(update={"known_classes": (True,)})
    with pytest.raises(UserError, match="states 1 classes of 2"):
        writer.commit(scans, [wrong, *cases[1:]], [])
    assert Archive.open(writer.path).fingerprint == archive.fingerprint


def test_recipe_config():
    block = {"source": {"name": "folder"}, "intensity": {"CT": {"kind": "window", "hu_range": [-160, 240]}}}
    recipe = parse(Recipe, block)
    assert recipe.policies()["CT"].hu_range == (-160, 240)
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe
    for wrong, match in [
        ({"spacing_mm": [1, 1, 0]}, "spacing_mm"),
        ({"order": 2}, "order"),
        ({"intensity": {"PET": {"kind": "robust_zscore"}}}, "no modality named 'PET'"),
        ({"split": {"test": 1.5}}, "share from 0 to below 1"),
        ({"spacing": 1}, "did you mean 'spacing_mm'"),
    ]:
        with pytest.raises(ConfigError, match=match):
            parse(Recipe, {**block, **wrong})


def test_a_hot_bladder_does_not_cut_the_suv_of_a_lesion():
    """Of a whole-body PET most is air: a bladder of 200 once cut all above 12.5."""
    values = np.zeros((40, 40, 40), np.float32)
    values[:4] = 2.5
    values[20, 20, 20], values[30, 30, 30] = 25.0, 200.0
    stored = store.quantise(values, None, unit="SUV")
    back = stored.stored * stored.scale + stored.offset
    assert back[20, 20, 20] == pytest.approx(25.0, abs=0.01)
    assert back[0, 0, 0] == pytest.approx(2.5, abs=0.002)
    assert stored.clipped
    assert back[30, 30, 30] == pytest.approx(50.0, abs=0.01)
