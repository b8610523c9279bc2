import csv
import gzip
import hashlib
import json
import re
import stat
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medseg_ssl.config import ConfigError, UserError, parse
from medseg_ssl.data import ingest, nifti, placing, store
from medseg_ssl.data.archive import Archive
from medseg_ssl.data.manifest import Split
from medseg_ssl.data.planning import Plan
from medseg_ssl.data.prepare import PrepareConfig, prepare
from tests.data.heads import head
from tests.data.scans import FOLDER, LABELED_FOLDER, affine, body, box_label, folder_tree, msd_task, save

SPLIT = {"seed": 0, "test": 1, "development": 1}


def config(source=None, **changes):
    return parse(PrepareConfig, {"source": source or {"name": "msd"}, "split": SPLIT, **changes})


def made(tmp_path, source=None, roots=None, **changes):
    path = prepare(config(source, **changes), roots or [tmp_path / "raw"], tmp_path / "out")
    return Archive.open(path)


def reasons(archive_path):
    with (archive_path / "dropped.csv").open() as stream:
        return {row["key"]: row["reason"] for row in csv.DictReader(stream)}


def private(archive_path):
    with (archive_path / "private" / "sources.csv").open() as stream:
        return dict(list(csv.reader(stream))[1:])


def only_reason(tmp_path, name):
    """Reason why the file ``name`` was dropped."""
    keys = {key for key, path in private(tmp_path / "out").items() if path.endswith(name)}
    [reason] = [reason for key, reason in reasons(tmp_path / "out").items() if key in keys]
    return reason


def whole(archive, key):
    row = archive.scans[key]
    return archive.read(key, (0, 0, 0), row.shape)


# -- what comes out --------------------------------------------------------------------------------------------------


def test_a_task_becomes_an_archive(tmp_path):
    msd_task(tmp_path / "raw", 5)
    archive = made(tmp_path)
    assert len(archive.scans) == len(archive.cases) == 5
    assert archive.classes == ("background", "organ", "tumour")
    assert archive.generation == 1
    split = archive.split()
    assert [len(split.train), len(split.development), len(split.test)] == [3, 1, 1]
    by_hash = {row.content_hash: row for row in archive.scans.values()}
    assert len(by_hash) == 5
    for case in archive.cases.values():
        row = archive.scans[case.scans[0]]
        assert case.known_classes == (True, True, True)
        assert (archive.read_label(case.case, (0, 0, 0), row.shape) == box_label()).all()
    volumes = [whole(archive, key) for key in archive.scans]
    assert any((v == body(0)).all() for v in volumes)
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["labeled_cases"] == 5


def test_nothing_in_the_archive_names_a_subject_or_a_path(tmp_path):
    msd_task(tmp_path / "raw", 6)
    made(
        tmp_path,
        {"name": "msd", "test_subjects": ["case_001"]},
        split={**SPLIT, "development_subjects": ["case_002"]},
    )
    for path in (tmp_path / "out").rglob("*"):
        if path.is_file() and path.parent.name != "private":
            content = path.read_bytes()
            assert b"case_0" not in content, path
            assert str(tmp_path).encode() not in content, path
    listed = tmp_path / "out" / "private" / "sources.csv"
    assert stat.S_IMODE(listed.stat().st_mode) == 0o600
    assert any(path.endswith("case_001.nii.gz") for path in private(tmp_path / "out").values())


def test_resampled_scans_and_labels(tmp_path):
    grid = affine((2.0, 1.0, 1.0))
    save(tmp_path / "raw" / "imagesTr" / "case_000.nii.gz", body(0), grid)
    msd_task(tmp_path / "raw", 3)
    save(tmp_path / "raw" / "imagesTr" / "case_000.nii.gz", body(0), grid)
    save(tmp_path / "raw" / "labelsTr" / "case_000.nii.gz", box_label(), grid)
    archive = made(tmp_path, spacing_mm=[1.0, 1.0, 2.0])
    shapes = sorted(row.shape for row in archive.scans.values())
    assert shapes == [(10, 12, 7), (10, 12, 7), (20, 12, 7)]
    [case] = [c for c in archive.cases.values() if archive.scans[c.scans[0]].shape == (20, 12, 7)]
    label = archive.read_label(case.case, (0, 0, 0), (20, 12, 7))
    original, own = archive.original_label(case.case)
    assert (original == box_label()).all()
    np.testing.assert_allclose(own, grid)
    # volumes of tissue agree: voxels are as large as before
    assert int(label.sum()) == pytest.approx(int(box_label().sum()), rel=0.2)


def test_any_worker_count_gives_the_same_archive(tmp_path):
    msd_task(tmp_path / "raw", 4)
    one = Archive.open(prepare(config(), [tmp_path / "raw"], tmp_path / "one", workers=1))
    two = Archive.open(prepare(config(), [tmp_path / "raw"], tmp_path / "two", workers=2))
    assert one.fingerprint == two.fingerprint
    content = [{r.content_hash: whole(a, k) for k, r in a.scans.items()} for a in (one, two)]
    for key, volume in content[0].items():
        assert (volume == content[1][key]).all()

    def places(archive):
        hashes = {row.subject: row.content_hash for row in archive.scans.values()}
        return [[hashes[s] for s in side] for side in (archive.split().train, archive.split().test)]

    assert places(one) == places(two)


def test_registered_scans_become_pairs_and_labeled_cases(tmp_path):
    folder_tree(tmp_path / "raw")
    archive = made(tmp_path, LABELED_FOLDER)
    assert len(archive.cases) == 6
    assert all(case.labeled and len(case.scans) == 1 for case in archive.cases.values())
    assert [p.relation for p in archive.pairs] == ["registered"] * 3
    assert archive.facts().channels == 1


def test_channels_go_on_the_grid_of_the_first(tmp_path):
    folder_tree(tmp_path / "raw", 3)
    coarse = affine((2.0, 2.0, 2.0), (0.5, 0.5, 0.5))
    for i in range(3):
        save(tmp_path / "raw" / f"sub_{i}_MR_T1.nii.gz", body(i, (5, 6, 7)), coarse)
    archive = made(tmp_path, {**LABELED_FOLDER, "channels": ["CT", "MR_T1"]})
    assert archive.facts().channels == 2
    assert {row.shape for row in archive.scans.values()} == {(10, 12, 14)}
    assert [p.relation for p in archive.pairs] == ["registered"] * 3


def test_channels_on_other_grids_need_a_declaration(tmp_path):
    folder_tree(tmp_path / "raw", 4)
    save(tmp_path / "raw" / "sub_0_MR_T1.nii.gz", body(0, (5, 6, 7)))
    block = {**LABELED_FOLDER, "channels": ["CT", "MR_T1"], "relation": None}
    archive = made(tmp_path, block)
    assert "does not declare the channels registered" in only_reason(tmp_path, "sub_0_MR_T1.nii.gz")
    assert only_reason(tmp_path, "sub_0_GTV.nii.gz") == "a channel of its case was dropped"
    # its CT is still there for pretraining
    assert sorted((c.labeled, len(c.scans)) for c in archive.cases.values()) == [(False, 1)] + [(True, 2)] * 3


def test_4d_files_become_one_scan_per_channel(tmp_path):
    msd_task(tmp_path / "raw", 3)
    task = json.loads((tmp_path / "raw" / "dataset.json").read_text())
    task["modality"] = {"0": "T1", "1": "FLAIR"}
    (tmp_path / "raw" / "dataset.json").write_text(json.dumps(task))
    for i in range(3):
        both = np.stack([body(i), body(i) + 7], axis=-1).transpose(2, 1, 0, 3)
        nib.save(nib.Nifti1Image(both, np.eye(4)), tmp_path / "raw" / "imagesTr" / f"case_{i:03d}.nii.gz")
    archive = made(tmp_path)
    assert archive.facts().channels == 2
    assert [p.relation for p in archive.pairs] == ["registered"] * 3
    for case in archive.cases.values():
        first, second = (whole(archive, key).astype(int) for key in case.scans)
        assert (second - first == 7).all()


def test_absent_classes_can_be_unknown(tmp_path):
    msd_task(tmp_path / "raw", 3)
    save(tmp_path / "raw" / "labelsTr" / "case_001.nii.gz", box_label(value=2))
    archive = made(tmp_path, {"name": "msd", "unknown_when_absent": ["tumour"]})
    assert sorted(c.known_classes for c in archive.cases.values()) == [(True, True, False)] * 2 + [
        (True, True, True)
    ]


# -- splits ----------------------------------------------------------------------------------------------------------


def test_a_public_test_part_is_never_trained_on(tmp_path):
    msd_task(tmp_path / "raw", 4, test=2)
    archive = made(tmp_path)
    unlabeled = {c.subject for c in archive.cases.values() if not c.labeled}
    assert len(unlabeled) == 2
    assert unlabeled <= set(archive.split().test)
    assert len(archive.split().test) == 3


def test_lots_fall_on_labeled_subjects_only(tmp_path):
    folder_tree(tmp_path / "raw", 6)
    for i in range(3):
        (tmp_path / "raw" / f"sub_{i}_GTV.nii.gz").unlink()
    archive = made(tmp_path, LABELED_FOLDER)
    labeled = {c.subject for c in archive.cases.values() if c.labeled}
    assert set(archive.split().test) | set(archive.split().development) <= labeled
    assert len(archive.split().train) == 4


def test_subjects_named_for_a_side(tmp_path):
    msd_task(tmp_path / "raw", 4)
    split = {"test": 0, "development": 0, "test_subjects": ["case_001"], "development_subjects": ["case_002"]}
    archive = made(tmp_path, split=split)
    paths = private(tmp_path / "out")
    where = {row.subject: paths[key] for key, row in archive.scans.items()}
    assert [where[s].endswith("case_001.nii.gz") for s in archive.split().test] == [True]
    assert [where[s].endswith("case_002.nii.gz") for s in archive.split().development] == [True]


def test_a_subject_in_two_splits(tmp_path):
    msd_task(tmp_path / "raw", 4)
    split = {**SPLIT, "test_subjects": ["case_001"], "development_subjects": ["case_001"]}
    with pytest.raises(ConfigError, match=r"'case_001' stands in test and in development.*one split only"):
        made(tmp_path, split=split)
    with pytest.raises(ConfigError, match=r"split.test_subjects names 'nobody', which no root holds"):
        made(tmp_path, split={**SPLIT, "test_subjects": ["nobody"]})


def test_a_source_may_reserve_a_subject_of_one_of_two_roots(tmp_path):
    first, second = msd_task(tmp_path / "raw", 3), msd_task(tmp_path / "more", 5)
    for i in range(5):
        save(second / "imagesTr" / f"case_{i:03d}.nii.gz", body(50 + i))
    source = {"name": "msd", "test_subjects": ["case_004"]}
    archive = made(tmp_path, source, roots=[first, second], split={"test": 0, "development": 0})
    assert len(archive.split().test) == 1
    with pytest.raises(ConfigError, match=r"source\.test_subjects names 'case_04', which no root holds"):
        prepare(config({"name": "msd", "test_subjects": ["case_04"]}), [first, second], tmp_path / "other")


def test_two_names_for_one_scan_cannot_part(tmp_path):
    msd_task(tmp_path / "raw", 4)
    for name in ("case_001", "case_002"):
        save(tmp_path / "raw" / "imagesTr" / f"{name}.nii.gz", body(7))
    split = {
        **SPLIT,
        "test": 0,
        "test_subjects": ["case_001"],
        "development": 0,
        "development_subjects": ["case_002"],
    }
    with pytest.raises(UserError, match="share a scan; one subject is in one split only"):
        made(tmp_path, split=split)


@pytest.mark.parametrize("near", [False, True])
def test_a_dropped_copy_of_a_test_subject_still_binds(tmp_path, near):
    """Its voxels are a test subject's under whatever name they stay."""
    msd_task(tmp_path / "raw", 4, test=1)
    copy = body(2) + (1 if near else 0)  # the same look in another number format
    save(tmp_path / "raw" / "imagesTs" / "case_004.nii.gz", copy)
    split = {"test": 0, "development": 0}
    archive = made(tmp_path, split=split, drop_duplicates="near" if near else True)
    assert len(archive.scans) == 4
    [subject] = archive.split().test
    assert len(archive.split().train) == 3
    [row] = [row for row in archive.scans.values() if row.subject == subject]
    assert (whole(archive, row.key) == body(2)).all()


def test_a_copy_reserved_for_test_of_what_trains_already_is_refused(tmp_path):
    msd_task(tmp_path / "raw", 4)
    made(tmp_path, split={"test": 0, "development": 0}, drop_duplicates=True)
    msd_task(tmp_path / "raw", 4, test=1)
    save(tmp_path / "raw" / "imagesTs" / "case_004.nii.gz", body(2))
    with pytest.raises(UserError, match="share a scan; one subject is in one split only"):
        made(tmp_path, split={"test": 0, "development": 0}, drop_duplicates=True)


def test_a_class_may_have_the_value_255(tmp_path):
    msd_task(tmp_path / "raw", 3, labels={"0": "background", "255": "lesion"})
    for i in range(3):
        save(tmp_path / "raw" / "labelsTr" / f"case_00{i}.nii.gz", box_label(value=255))
    archive = made(tmp_path, split={"test": 0, "development": 0})
    for case in archive.cases.values():
        label = archive.read_label(case.case, (0, 0, 0), archive.scans[case.scans[0]].shape)
        assert (label == box_label()).all()
        assert case.known_classes == (True, True)


@pytest.mark.parametrize("labels", [{"0": "background", "256": "x"}, {str(i): f"c{i}" for i in range(256)}])
def test_more_classes_than_a_label_map_holds(tmp_path, labels):
    msd_task(tmp_path / "raw", 3, labels=labels)
    with pytest.raises(ConfigError, match="a label map here holds values up to 255 and 254 classes"):
        made(tmp_path)


def test_a_header_that_would_fill_the_memory_drops_its_scan(tmp_path):
    msd_task(tmp_path / "raw", 3)
    save(tmp_path / "raw" / "imagesTr" / "case_001.nii.gz", body(1), affine((1000.0, 1000.0, 1000.0)))
    archive = made(tmp_path, split={"test": 0, "development": 0}, spacing_mm=[1.0, 1.0, 1.0])
    assert len(archive.scans) == 2
    reason = only_reason(tmp_path, "imagesTr/case_001.nii.gz")
    assert reason.startswith("resampled it would have 10000×12000×14000 voxels, more than 2147483648")
    assert reason.endswith("its header states 10×12×14 voxels of 1000×1000×1000 mm")


def test_a_case_that_no_memory_holds_is_dropped_and_tried_again(tmp_path, monkeypatch):
    msd_task(tmp_path / "raw", 3)
    read, refused = nifti.read_nifti, [True]

    def big(path, **options):
        if refused[0] and path.name == "case_001.nii.gz":
            raise MemoryError
        return read(path, **options)

    monkeypatch.setattr(nifti, "read_nifti", big)
    split = {"test": 0, "development": 0}
    assert len(made(tmp_path, split=split).scans) == 2
    reason = only_reason(tmp_path, "imagesTr/case_001.nii.gz")
    assert reason == "it did not fit into memory, or the process that prepared it died"
    refused[0] = False
    assert len(made(tmp_path, split=split).scans) == 3
    assert reasons(tmp_path / "out") == {}


def test_two_runs_do_not_share_an_archive(tmp_path, monkeypatch):
    msd_task(tmp_path / "raw", 3)
    messages = []

    def meanwhile(task):
        try:
            made(tmp_path)
        except UserError as error:
            messages.append(str(error))
        return ingest.ingest(task)

    monkeypatch.setattr("medseg_ssl.data.prepare.ingest", meanwhile)
    assert len(made(tmp_path).scans) == 3
    assert set(messages) == {
        f"another process is working on {tmp_path / 'out'}; wait for it, or name another folder"
    }
    monkeypatch.undo()
    assert len(made(tmp_path).scans) == 3


def test_a_relation_that_rows_gave_goes_with_them(tmp_path):
    """Two scans once in one frame of reference; the source was corrected since."""
    root = tmp_path / "raw"
    for name, seed in (("T1w", 1), ("T2w", 2)):
        save(root / "sub-01/anat" / f"sub-01_{name}.nii.gz", body(seed))
        (root / "sub-01/anat" / f"sub-01_{name}.json").write_text('{"FrameOfReferenceUID": "1.2"}')
    save(root / "sub-02/anat/sub-02_T1w.nii.gz", body(3))
    (root / "dataset_description.json").write_text('{"Name": "s", "BIDSVersion": "1.8.0"}')
    split = {"test": 0, "development": 0}
    assert [p.relation for p in made(tmp_path, {"name": "bids"}, split=split).pairs] == ["same_frame"]
    (root / "sub-01/anat/sub-01_T2w.json").write_text('{"FrameOfReferenceUID": "1.3"}')
    assert [p.relation for p in made(tmp_path, {"name": "bids"}, split=split).pairs] == ["same_study"]


def test_a_twin_of_a_twin_stays_on_its_side():
    split = Split(name="default", seed=0, train=("a",), development=(), test=("t",))
    # u1 shares with u2 alone, u2 with the test subject; u1 comes first by content
    hashes = {"a": {"9"}, "t": {"8"}, "u1": {"1", "2"}, "u2": {"2", "8"}, "u3": {"3"}, "u4": {"3", "4"}}
    placed = placing._placed(split, hashes, {"a": "train", "t": "test"}, Plan())
    assert set(placed.test) == {"t", "u1", "u2"}
    assert set(placed.train) == {"a", "u3", "u4"}


@pytest.mark.parametrize("drop", [False, True])
def test_duplicates(tmp_path, drop):
    folder_tree(tmp_path / "raw", 4)
    save(tmp_path / "raw" / "sub_x_CT.nii.gz", body(0) - 1000)
    archive = made(tmp_path, LABELED_FOLDER, drop_duplicates=drop)
    flagged = [row for row in archive.scans.values() if "duplicate" in row.quality]
    if drop:
        assert (len(archive.scans), flagged) == (8, [])
        assert only_reason(tmp_path, "sub_x_CT.nii.gz").startswith("same voxels as scan")
    else:
        # the labeled one is the original
        assert (len(archive.scans), len(flagged)) == (9, 1)
        assert not any(set(c.scans) & {flagged[0].key} for c in archive.cases.values() if c.labeled)


def test_a_named_check_drops_with_its_numbers_and_the_others_flag(tmp_path):
    msd_task(tmp_path / "raw", 4)
    again = body(0)
    again[5] = again[4]
    save(tmp_path / "raw" / "imagesTr" / "case_000.nii.gz", again)
    dropped = "repeated_slices: 1 planes equal to their neighbour (repeated_slices: 0)"
    archive = made(tmp_path, quality={"drop": ["repeated_slices", "wrong_scale"]})
    assert len(archive.scans) == 3
    assert only_reason(tmp_path, "imagesTr/case_000.nii.gz") == dropped
    assert only_reason(tmp_path, "labelsTr/case_000.nii.gz") == "its scan was dropped"
    # 1680 voxels are few, and that is only said
    assert all("tiny" in row.quality for row in archive.scans.values())
    path = prepare(config(quality={"tiny_voxels": 1000, "tiny_mm": 1}), [tmp_path / "raw"], tmp_path / "mild")
    flags = [row.quality for row in Archive.open(path).scans.values() if row.quality]
    assert [[flag for flag in quality if flag != "saturated"] for quality in flags] == [["repeated_slices"]]


def near_copies(root):
    """Four heads, and a fifth subject who is the third one with other numbers in the file."""
    for i in range(4):
        save(root / f"head_{i}_MR_T1.nii.gz", head(i))
    save(root / "again_2_MR_T1.nii.gz", np.rint(head(2) * 3 + 20))
    return root


def test_a_near_copy_under_another_name_stays_on_its_side(tmp_path):
    near_copies(tmp_path / "raw")
    block = {**FOLDER, "pattern": "{subject}_{modality}.nii.gz"}
    for seed in range(4):
        path = prepare(
            config(block, split={**SPLIT, "seed": seed}), [tmp_path / "raw"], tmp_path / f"out{seed}"
        )
        archive = Archive.open(path)
        [copy] = [row for row in archive.scans.values() if "near_duplicate" in row.quality]
        places = private(path)
        twins = {row.subject for key, row in archive.scans.items() if "_2_" in places[key]}
        assert copy.subject in twins
        assert len(twins) == 2
        assert any(twins <= set(getattr(archive.split(), side)) for side in ("train", "development", "test"))
        summary = json.loads((path / "summary.json").read_text())
        assert summary["quality"]["near_duplicate"] == 1
        [note] = [note for note in summary["notes"] if note.startswith("maybe one subject under two names: ")]
        assert all(subject in note for subject in twins)
        assert "head_2" not in note
    # named for two sides they stay there: a look is no proof, and pretraining will ask
    split = {"test": 0, "development": 0, "test_subjects": ["head_2"], "development_subjects": ["again_2"]}
    archive = Archive.open(prepare(config(block, split=split), [tmp_path / "raw"], tmp_path / "named"))
    assert (len(archive.split().test), len(archive.split().development)) == (1, 1)


def test_near_copies_are_dropped_where_the_recipe_says_so(tmp_path):
    near_copies(tmp_path / "raw")
    archive = made(tmp_path, FOLDER, drop_duplicates="near")
    assert len(archive.scans) == 4
    assert re.match(r"near copy of scan [0-9a-f]+: similarity 1\.000", reasons(tmp_path / "out").popitem()[1])
    with pytest.raises(ConfigError, match="drop_duplicates"):
        config(drop_duplicates="all")


def test_an_archive_made_before_appearances_opens_and_grows(tmp_path):
    near_copies(tmp_path / "raw")
    before = made(tmp_path, FOLDER)
    path = tmp_path / "out"
    rows = [json.loads(line) for line in (path / "manifest.jsonl").read_text().splitlines()]
    for row in rows:
        del row["appearance"]
    older = "".join(json.dumps(row) + "\n" for row in rows)
    head_file = json.loads((path / "archive.json").read_text())
    for key in ("quality", "near_duplicate"):
        del head_file["recipe"][key]
    head_file["rows"]["manifest.jsonl"] = hashlib.sha256(older.encode()).hexdigest()
    (path / "manifest.jsonl").write_text(older)
    (path / "archive.json").write_text(json.dumps(head_file))
    opened = Archive.open(path)
    assert {row.appearance for row in opened.scans.values()} == {""}
    assert opened.recipe == before.recipe
    grown = made(tmp_path, FOLDER)
    assert all(row.appearance for row in grown.scans.values())


# -- again and again -------------------------------------------------------------------------------------------------


def test_a_second_run_changes_nothing_and_reads_no_voxel(tmp_path, monkeypatch):
    msd_task(tmp_path / "raw", 4)
    before = made(tmp_path)
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "volumes").iterdir()}
    monkeypatch.setattr(ingest.nifti, "read_nifti", lambda *a, **k: pytest.fail("read a finished scan"))
    monkeypatch.setattr(ingest.nifti, "read_label", lambda *a, **k: pytest.fail("read a finished label"))
    after = made(tmp_path)
    assert (after.generation, after.fingerprint) == (1, before.fingerprint)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "volumes").iterdir()} == stamps


def test_the_scanner_comes_to_an_archive_made_before_it_was_kept(tmp_path, monkeypatch):
    folder_tree(tmp_path / "raw" / "Prisma 1", 4, labels=False)
    block = {**FOLDER, "pattern": "{scanner}/{subject}_{modality}.nii.gz"}
    with monkeypatch.context() as earlier:
        earlier.setattr("medseg_ssl.data.sources.folder.scanner_name", lambda *_: "")
        before = made(tmp_path, block)
    assert {row.scanner for row in before.scans.values()} == {""}
    monkeypatch.setattr(ingest.nifti, "read_nifti", lambda *a, **k: pytest.fail("read a finished scan"))
    after = made(tmp_path, block)
    assert {row.scanner for row in after.scans.values()} == {"prisma 1"}
    assert after.fingerprint == before.fingerprint
    assert {row.scanner for row in made(tmp_path, block).scans.values()} == {"prisma 1"}


def test_a_source_that_changed_gets_a_new_row(tmp_path):
    msd_task(tmp_path / "raw", 4)
    before = made(tmp_path)
    save(tmp_path / "raw" / "imagesTr" / "case_000.nii.gz", body(77) / 3)
    save(tmp_path / "raw" / "labelsTr" / "case_000.nii.gz", box_label(value=2))
    after = made(tmp_path)
    [changed] = [key for key in after.scans if after.scans[key] != before.scans[key]]
    row = after.scans[changed]
    assert (after.generation, row.generation) == (2, 2)
    assert before.scans[changed].scale == 1.0
    physical = whole(after, changed) * row.scale + row.offset
    np.testing.assert_allclose(physical, body(77) / 3, atol=0.51 * row.scale)


def test_a_file_that_vanished_is_dropped(tmp_path, monkeypatch):
    task = msd_task(tmp_path / "raw", 4)
    monkeypatch.setattr(ingest.store, "stamp_of", _gone(task / "imagesTr" / "case_002.nii.gz"))
    archive = made(tmp_path)
    assert len(archive.scans) == 3
    assert (
        only_reason(tmp_path, "imagesTr/case_002.nii.gz") == "cannot read the file: No such file or directory"
    )


def _gone(missing):
    stamp_of = store.stamp_of

    def stamp(*files):
        if missing in files:
            missing.unlink(missing_ok=True)
        return stamp_of(*files)

    return stamp


def test_the_padding_of_a_ct_is_no_data(tmp_path):
    volume = body(1)
    volume[:, :, :4] = -3024
    save(tmp_path / "raw" / "a_CT.nii.gz", volume)
    zero = body(2)
    zero[:, :, :4] = 0  # water, not padding
    for i in range(3):
        save(tmp_path / "raw" / f"b{i}_CT.nii.gz", zero + i * (zero > 0))
    archive = made(tmp_path, source={"name": "folder", "pattern": "{subject}_{modality}.nii.gz"})
    lowest = {row.statistics.minimum: row for row in archive.scans.values()}
    padded = [row for row in archive.scans.values() if "no_data" in row.quality]
    assert len(padded) == 1
    assert whole(archive, padded[0].key)[0, 0, 0] == store.NO_DATA
    assert padded[0].statistics.minimum > -1000
    assert 0.0 in lowest


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    msd_task(tmp_path / "raw", 5)
    written = []

    def killed(*arguments, **named):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(1)
        return write(*arguments, **named)

    write = store.write_volume
    monkeypatch.setattr(store, "write_volume", killed)
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path)
    assert not (tmp_path / "out" / "archive.json").exists()
    monkeypatch.setattr(store, "write_volume", lambda *a, **k: written.append(2) or write(*a, **k))
    archive = made(tmp_path)
    assert len(archive.scans) == 5
    assert written == [1, 1, 1, 2, 2]
    assert not [p for p in (tmp_path / "out").rglob("*") if "part" in p.name]


def test_an_archive_grows_by_generations(tmp_path):
    first, second = msd_task(tmp_path / "raw", 4), msd_task(tmp_path / "more", 6)
    for i in range(6):
        save(second / "imagesTr" / f"case_{i:03d}.nii.gz", body(50 + i))
        (second / "imagesTr" / f"case_{i:03d}.nii.gz").rename(second / "imagesTr" / f"new_{i:03d}.nii.gz")
        (second / "labelsTr" / f"case_{i:03d}.nii.gz").rename(second / "labelsTr" / f"new_{i:03d}.nii.gz")
    text = (second / "dataset.json").read_text().replace("case_", "new_")
    (second / "dataset.json").write_text(text)
    before = made(tmp_path, roots=[first])
    split = before.split()
    after = made(tmp_path, roots=[second])
    assert (before.generation, after.generation) == (1, 2)
    assert len(after.scans) == 10
    assert sorted(row.generation for row in after.scans.values()) == [1] * 4 + [2] * 6
    assert before.fingerprint != after.fingerprint
    # nobody changes sides, and the new subjects train
    assert after.split().test == split.test
    assert after.split().development == split.development
    assert len(after.split().train) == 8
    assert len(private(tmp_path / "out")) == 21


def test_another_recipe_is_refused_with_the_difference(tmp_path):
    msd_task(tmp_path / "raw", 4)
    made(tmp_path)
    with pytest.raises(ConfigError, match=r"another recipe \(order: 3 there, 1 now\)"):
        made(tmp_path, order=1)


def test_an_interrupted_run_may_change_its_split_but_not_its_voxels(tmp_path, monkeypatch):
    msd_task(tmp_path / "raw", 5)
    with monkeypatch.context() as patch:
        patch.setattr(store, "write_volume", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            made(tmp_path)
    with pytest.raises(ConfigError, match="another recipe"):
        made(tmp_path, spacing_mm=[2, 2, 2])
    archive = made(tmp_path, split={**SPLIT, "test": 2})
    assert len(archive.split().test) == 2


# -- bad input -------------------------------------------------------------------------------------------------------


def test_a_folder_that_is_no_archive_is_left_alone(tmp_path):
    msd_task(tmp_path / "raw", 3)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.doc").touch()
    with pytest.raises(UserError, match="is no archive; choose another"):
        made(tmp_path)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.doc"]


def test_truncated_and_foreign_files_are_dropped_by_name(tmp_path):
    msd_task(tmp_path / "raw", 5)
    images = tmp_path / "raw" / "imagesTr"
    whole_file = gzip.decompress((images / "case_000.nii.gz").read_bytes())
    (images / "case_000.nii.gz").write_bytes(gzip.compress(whole_file[: len(whole_file) // 2]))
    (images / "case_001.nii.gz").write_bytes(b"<html>404</html>")
    archive = made(tmp_path)
    assert len(archive.scans) == 3
    assert only_reason(tmp_path, "imagesTr/case_000.nii.gz")
    assert only_reason(tmp_path, "imagesTr/case_001.nii.gz")
    assert only_reason(tmp_path, "labelsTr/case_001.nii.gz") == "its scan was dropped"
    assert not any("case_0" in reason for reason in reasons(tmp_path / "out").values())


@pytest.mark.parametrize(
    ("array", "grid", "reason"),
    [
        (
            box_label((10, 12, 13)),
            affine(),
            r"label grid differs from its scan: shape 10×12×13, the scan's is 10×12×14",
        ),
        (box_label(), affine(origin=(3, 0, 0)), r"same shape, but a corner lies 3.00 mm away"),
        (box_label(value=9), affine(), "label value 9 is none of the classes 0, 1, 2"),
        (box_label().astype(np.float32) * 0.5, affine(), "must hold whole numbers"),
    ],
)
def test_a_bad_label_is_dropped_and_its_scan_kept(tmp_path, array, grid, reason):
    msd_task(tmp_path / "raw", 4)
    save(tmp_path / "raw" / "labelsTr" / "case_002.nii.gz", array, grid)
    archive = made(tmp_path)
    assert len(archive.scans) == 4
    assert sorted(c.labeled for c in archive.cases.values()) == [False, True, True, True]
    assert re.search(reason, only_reason(tmp_path, "labelsTr/case_002.nii.gz"))


def test_a_label_on_another_grid_can_be_resampled(tmp_path):
    msd_task(tmp_path / "raw", 4)
    fine = affine((0.5, 1.0, 1.0), (0.0, 0.0, -0.25))
    save(tmp_path / "raw" / "labelsTr" / "case_002.nii.gz", np.repeat(box_label(), 2, axis=0), fine)
    archive = made(tmp_path, resample_labels=True)
    assert all(c.labeled for c in archive.cases.values())
    [case] = [
        c.case for c in archive.cases.values() if archive.original_label(c.case)[0].shape == (20, 12, 14)
    ]
    assert (archive.read_label(case, (0, 0, 0), (10, 12, 14)) == box_label()).all()


def test_nan_is_no_data_or_dropped(tmp_path):
    msd_task(tmp_path / "raw", 4)
    broken = body(0)
    broken[4, 5, 6] = np.nan
    save(tmp_path / "raw" / "imagesTr" / "case_000.nii.gz", broken)
    archive = made(tmp_path)
    [row] = [row for row in archive.scans.values() if "non_finite" in row.quality]
    assert whole(archive, row.key)[4, 5, 6] == store.NO_DATA
    assert np.isfinite(row.statistics.mean)
    [note] = json.loads((tmp_path / "out" / "summary.json").read_text())["notes"]
    assert note.startswith("1 scans hold NaN or infinite voxels")
    path = prepare(config(non_finite="drop"), [tmp_path / "raw"], tmp_path / "strict")
    assert len(Archive.open(path).scans) == 3
    assert any(reason.startswith("1 voxels are NaN or infinite") for reason in reasons(path).values())


@pytest.mark.parametrize(
    ("largest", "kept"), [(3e38, False), (1e300, False), (1e-40, False), (1e17, True), (1e-12, True)]
)
@pytest.mark.filterwarnings("error")
def test_values_no_scanner_writes(tmp_path, largest, kept):
    """Numbers at the ends of float32 or beyond: a reason, or statistics that are numbers; never an overflow."""
    root = folder_tree(tmp_path / "raw", subjects=1, labels=False)
    values = np.random.default_rng(0).random((12, 12, 12)) * largest
    odd = nib.Nifti1Image(values, np.eye(4), dtype=np.float64)
    nib.save(odd, root / "sub_0_MR_T1.nii.gz")
    path = prepare(config(FOLDER, split={"test": 0, "development": 0}), [root], tmp_path / "out")
    assert len(reasons(path)) == (not kept)
    rows = Archive.open(path).scans.values()
    assert any(row.statistics.maximum > 0.5 * largest and row.statistics.std > 0 for row in rows) or not kept


def test_no_scan_kept(tmp_path):
    msd_task(tmp_path / "raw", 3)
    for path in (tmp_path / "raw" / "imagesTr").iterdir():
        path.write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"no scan kept of 6 files") as caught:
        made(tmp_path)
    assert caught.value.code == 1
    assert "\n" not in str(caught.value)
    # the place is free for another try
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_one_line_and_nothing_is_lost(tmp_path, monkeypatch):
    msd_task(tmp_path / "raw", 4)
    made(tmp_path)
    before = (tmp_path / "out" / "archive.json").read_bytes()
    save(tmp_path / "raw" / "imagesTr" / "case_000.nii.gz", body(77))

    def full(*arguments, **named):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "write_volume", full)
    with pytest.raises(UserError, match=r"no space left for the archive"):
        made(tmp_path)
    assert (tmp_path / "out" / "archive.json").read_bytes() == before
    assert len(Archive.open(tmp_path / "out").scans) == 4


def test_roots_with_other_classes(tmp_path):
    roots = [
        msd_task(tmp_path / "a", 2),
        msd_task(tmp_path / "b", 2, labels={"0": "background", "1": "liver"}),
    ]
    with pytest.raises(ConfigError, match="the roots have different classes"):
        made(tmp_path, roots=roots)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spacing": [1, 1, 1]}, r"unknown key 'spacing' \(did you mean 'spacing_mm'"),
        ({"spacing_mm": [1, 0, 1]}, r"spacing_mm\.1: .*greater than 0"),
        ({"intensity": {"XR": {"kind": "window"}}}, "intensity"),
        ({"split": {"test": 1.5}}, "number of subjects or a share"),
        ({"split": {"tests": 3}}, r"unknown key 'split\.tests' \(did you mean 'test'"),
    ],
)
def test_wrong_config_keys(change, message):
    with pytest.raises(ConfigError, match=message):
        config(**change)


def test_more_test_subjects_than_there_are(tmp_path):
    msd_task(tmp_path / "raw", 3)
    with pytest.raises(ConfigError, match="leave none of 3 subjects for training"):
        made(tmp_path, split={"test": 3, "development": 1})
    # found before anything is read or written
    assert not (tmp_path / "out").exists()


# -- real scans ------------------------------------------------------------------------------------------------------


@pytest.mark.realdata
def test_a_label_on_a_third_grid_is_refused(real_data, tmp_path):
    source = {
        "name": "folder",
        "pattern": "{subject}/study1_{modality}.nii.gz",
        "modalities": {
            "FLAIR": {"modality": "MR", "contrast": "FLAIR"},
            "T1W": {"modality": "MR", "contrast": "T1w"},
        },
        "label_pattern": "{subject}/gt.nii.gz",
        "classes": {1: "lesion"},
    }
    root = real_data / "open_ms_mr" / "raw_unregistered"
    path = prepare(config(source, split={"test": 0, "development": 0}), [root], tmp_path / "out")
    archive = Archive.open(path)
    assert [p.relation for p in archive.pairs] == ["same_study"]
    assert not any(case.labeled for case in archive.cases.values())
    assert all(r.startswith("label grid differs from its scan") for r in reasons(path).values())


@pytest.mark.realdata
def test_odd_files_never_raise(real_data, tmp_path):
    source = {
        "name": "folder",
        "regex": r"(?P<subject>.+)\.nii(\.gz)?",
        "modalities": {"any": {"modality": "MR"}},
    }
    path = prepare(
        config(source, split={"test": 0, "development": 0}), [real_data / "nifti_odd"], tmp_path / "out"
    )
    archive = Archive.open(path)
    assert len(archive.scans) > 24
    with (path / "private" / "sources.csv").open(newline="") as file:
        named = {key: Path(place.split("#")[0]) for key, place in list(csv.reader(file))[2:]}
    dropped = dict(csv.reader((path / "dropped.csv").open(newline="")))
    assert set(named.values()) == {p for p in (real_data / "nifti_odd").rglob("*.*") if p.is_file()}
    assert set(named) == {*archive.scans, *dropped} - {"key"}
    assert not set(archive.scans) & set(dropped), "none is both"
    why = {place.name: dropped.get(key) for key, place in named.items()}
    assert why["mha.mha"] == "a MetaImage volume; only NIfTI (.nii, .nii.gz) and DICOM are read: convert it"
    assert why["complex.nii.gz"] == "complex voxels; give the magnitude image"
    assert why["sub-01_ses-baseline_T1w.nii.gz"] == "empty: every voxel has the value 0"
    # 24 orientations of one volume are one volume
    assert sum("duplicate" in row.quality for row in archive.scans.values()) >= 23
