import json
from pathlib import Path

import numpy as np
import pytest

from medseg_ssl.config import ConfigError, UserError, parse
from medseg_ssl.data import store
from medseg_ssl.data.archive import Archive
from medseg_ssl.data.prepare import PrepareConfig, prepare
from medseg_ssl.data.sources import openmind
from tests.data.scans import SHAPE, affine, body, box_label, save
from tests.data.test_sources import listing, touch


def image(path, modality="T1w", mask=None, anatomy=None):
    """An entry as nnssl's ``Collection.to_dict`` writes it."""
    return {
        "name": path.rsplit("/", 1)[-1],
        "image_path": path,
        "modality": modality,
        "image_info": {"manufacturer": "X"},
        "associated_masks": {"anonymization_mask": mask, "anatomy_mask": anatomy},
    }


def collection(root, images, name="pretrain_data.json"):
    """A collection; ``images`` maps (data set, subject, session) to entries."""
    content = {"collection_index": 745, "collection_name": "Dataset745_OpenMind", "datasets": {}}
    for (dataset, subject, session), entries in images.items():
        at = content["datasets"].setdefault(
            dataset, {"dataset_index": dataset, "name": None, "dataset_info": {}, "subjects": {}}
        )
        person = at["subjects"].setdefault(
            subject, {"subject_id": subject, "subject_info": {"age": 26}, "sessions": {}}
        )
        person["sessions"][session] = {"session_id": session, "session_info": None, "images": entries}
    root.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(json.dumps(content))
    return root


def one(root, *entries):
    """A collection of one session, with every file it names."""
    touch(root, *(entry["image_path"] for entry in entries))
    return collection(root, {("ds1", "sub-01", "ses-DEFAULT"): list(entries)})


def found(root, **options):
    return listing(root, name="openmind", **options)


def scans(listed):
    return {case.scans[0].path.name: case.scans[0] for case in listed.cases}


def reasons(listed):
    return {path.name: reason for path, reason in listed.rejected}


OPENMIND = """
ADC DWI FA FLAIR FLASH MD MP2RAGE PDw PET SWI T1map T1w T2map T2starmap T2starw T2w TRACE UNIT1 UNIT1_denoised angio
inplaneT1 inplaneT2 minIP sbref
"""


# -- the list --------------------------------------------------------------------------------------------------------


def test_a_collection(tmp_path):
    touch(tmp_path, "ds1/a.nii.gz", "ds1/b.nii.gz", "ds2/a.nii.gz", "ds2/unnamed.nii.gz")
    images = {
        ("ds1", "sub-01", "ses-1"): [image("ds1/a.nii.gz")],
        ("ds1", "sub-01", "ses-2"): [image("ds1/b.nii.gz", "T2starw")],
        ("ds2", "sub-01", "ses-DEFAULT"): [image("ds2/a.nii.gz", "FA")],
    }
    listed = found(collection(tmp_path, images))
    assert [(s.subject, s.study, s.modality, s.contrast, s.frame) for c in listed.cases for s in c.scans] == [
        ("ds1/sub-01", "ses-1", "MR", "T1w", ""),
        ("ds1/sub-01", "ses-2", "MR", "T2starw", ""),
        ("ds2/sub-01", "ses-DEFAULT", "MR", "FA", ""),
    ]
    assert not listed.rejected
    assert not listed.classes


def test_every_modality_of_openmind_is_known(tmp_path):
    names = OPENMIND.split()
    listed = found(one(tmp_path, *(image(f"{name}.nii.gz", name) for name in names)))
    assert len(listed.cases) == len(names) == 24
    kinds = {name.removesuffix(".nii.gz"): scan for name, scan in scans(listed).items()}
    assert (kinds["PET"].modality, kinds["PET"].unit) == ("PT", "raw")
    assert {scan.modality for name, scan in kinds.items() if name != "PET"} == {"MR"}


def test_other_collections_name_modalities_as_they_like(tmp_path):
    root = one(tmp_path, image("a.nii.gz", "CT"), image("b.nii.gz", "DOE JANE"))
    listed = found(root)
    assert scans(listed)["a.nii.gz"].unit == "HU"
    assert reasons(listed)["b.nii.gz"].startswith("its modality is none of the known ones: T1w, ")
    assert "DOE" not in reasons(listed)["b.nii.gz"]
    listed = found(root, modalities={"DOE JANE": {"modality": "MR", "contrast": "T2w"}}, only=["DOE JANE"])
    assert scans(listed)["b.nii.gz"].contrast == "T2w"
    assert reasons(listed) == {"a.nii.gz": "its modality is none of source.only: DOE JANE"}


@pytest.mark.parametrize(
    ("path", "prefixes"),
    [
        ("ds1/a.nii.gz", {}),
        ("$nnssl_raw/ds1/a.nii.gz", {}),
        ("$openmind/a.nii.gz", {"openmind": "ds1"}),
        ("ROOT/ds1/a.nii.gz", {}),
    ],
)
def test_paths(tmp_path, path, prefixes):
    touch(tmp_path, "ds1/a.nii.gz")
    entry = image(path.replace("ROOT", str(tmp_path)))
    listed = found(collection(tmp_path, {("ds1", "s", "x"): [entry]}), prefixes=prefixes)
    assert [case.scans[0].path for case in listed.cases] == [tmp_path / "ds1" / "a.nii.gz"]


@pytest.mark.parametrize("path", ["../a.nii.gz", "$raw/../../a.nii.gz", "/elsewhere/a.nii.gz"])
def test_paths_outside_of_the_root(tmp_path, path):
    touch(tmp_path, "a.nii.gz", "tree/b.nii.gz")
    root = collection(tmp_path / "tree", {("ds1", "s", "x"): [image(path), image("b.nii.gz")]})
    listed = found(root)
    assert list(scans(listed)) == ["b.nii.gz"]
    assert reasons(listed)["a.nii.gz"].startswith("the collection names it outside of the root")


def test_missing_and_repeated_files(tmp_path):
    root = one(tmp_path, image("a.nii.gz"), image("a.nii.gz"), image("b.nii.gz"))
    (root / "b.nii.gz").unlink()
    listed = found(root)
    assert len(listed.cases) == 1
    assert reasons(listed) == {
        "a.nii.gz": "the collection names it a second time",
        "b.nii.gz": "the collection names it, but there is no such file",
    }


def test_nothing_there(tmp_path):
    with pytest.raises(UserError, match=r"no other\.json \(source\.collection names"):
        found(tmp_path, collection="other.json")
    root = one(tmp_path, image("a.nii.gz"))
    (root / "a.nii.gz").unlink()
    with pytest.raises(
        UserError, match=r"of 1 images that pretrain_data\.json names none is one; a\.nii\.gz"
    ):
        found(root)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "no valid JSON"),
        ("[]", "must hold a mapping, found list"),
        ("{}", "must hold a mapping 'datasets', as nnssl writes it"),
        ('{"datasets": {"a": {"subjects": []}}}', "a data set must hold a mapping 'subjects'.*got list"),
        ('{"datasets": {"a": {"subjects": {"JANE": 1}}}}', "a subject must hold a mapping 'sessions'"),
        (
            '{"datasets": {"a": {"subjects": {"JANE": {"sessions": {"x": {"images": {}}}}}}}}',
            "a session must hold a list 'images'",
        ),
        (
            '{"datasets": {"a": {"subjects": {"JANE": {"sessions": {"x": {"images": [{"path": "a"}]}}}}}}}',
            "an image must hold a text 'image_path', got NoneType; its keys: path",
        ),
    ],
)
def test_a_json_of_another_kind(tmp_path, content, message):
    (tmp_path / "pretrain_data.json").write_text(content)
    with pytest.raises(UserError, match=message) as refused:
        found(tmp_path)
    assert "JANE" not in str(refused.value)


def test_a_json_that_is_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(openmind, "COLLECTION_BYTES", 10)
    with pytest.raises(UserError, match="more than the 10 that are read"):
        found(one(tmp_path, image("a.nii.gz")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"collection": "../x.json"}, "must be a path below the root"),
        ({"prefixes": {"$raw": "."}}, r"a placeholder without its \$"),
        ({"prefixes": {"raw": "../x"}}, "to a folder below the root"),
    ],
)
def test_wrong_options(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        found(tmp_path, **options)


def test_subjects_reserved_for_test(tmp_path):
    root = one(tmp_path, image("a.nii.gz"))
    assert found(root, test_subjects=["ds1/sub-01"]).test_subjects == {"ds1/sub-01"}
    with pytest.raises(UserError, match="test_subjects names 'sub-01', which is not in"):
        found(root, test_subjects=["sub-01"])


# -- what was defaced ------------------------------------------------------------------------------------------------


def test_masks_are_found_and_can_be_left_alone(tmp_path):
    touch(tmp_path, "mask.nii.gz")
    root = one(tmp_path, image("a.nii.gz", mask="$raw/mask.nii.gz"), image("b.nii.gz", mask="gone.nii.gz"))
    listed = found(root)
    assert scans(listed)["a.nii.gz"].no_data_mask == tmp_path / "mask.nii.gz"
    assert reasons(listed)["b.nii.gz"].startswith("its anonymization_mask is not there")
    listed = found(root, anonymization_masks=False)
    assert {scan.no_data_mask for scan in scans(listed).values()} == {None}


def defaced(root, mask, grid=None):
    """Two scans; the first was defaced, where the mask says."""
    save(root / "a.nii.gz", body(1))
    save(root / "b.nii.gz", body(2))
    save(root / "mask.nii.gz", mask, grid)
    entries = [image("a.nii.gz", mask="mask.nii.gz"), image("b.nii.gz")]
    return collection(root, {("ds1", "sub-01", "ses-1"): entries})


def prepared(tmp_path, **recipe):
    block = {"source": {"name": "openmind"}, "split": {"test": 0, "development": 0}, **recipe}
    return Archive.open(prepare(parse(PrepareConfig, block), [tmp_path / "raw"], tmp_path / "out"))


def whole(archive, row):
    return archive.read(row.key, (0, 0, 0), row.shape)


def masked_row(archive):
    [row] = [row for row in archive.scans.values() if "no_data" in row.quality]
    return row


def test_defaced_voxels_are_no_data(tmp_path):
    mask = box_label()
    defaced(tmp_path / "raw", mask)
    archive = prepared(tmp_path)
    assert len(archive.scans) == 2
    row = masked_row(archive)
    stored = whole(archive, row)
    np.testing.assert_array_equal(stored == store.NO_DATA, mask != 0)
    np.testing.assert_array_equal(stored[mask == 0] * row.scale + row.offset, body(1)[mask == 0])
    # what lies under the mask enters no statistic
    assert row.statistics.maximum == body(1)[mask == 0].max()
    [other] = [r for r in archive.scans.values() if r.key != row.key]
    assert not (whole(archive, other) == store.NO_DATA).any()


def test_a_mask_in_other_axes_is_the_same_mask(tmp_path):
    import nibabel as nib

    mask = box_label()
    defaced(tmp_path / "raw", mask)
    path = tmp_path / "raw" / "mask.nii.gz"
    nib.save(nib.Nifti1Image.from_filename(path).as_reoriented([[1, -1], [2, 1], [0, -1]]), path)
    archive = prepared(tmp_path)
    np.testing.assert_array_equal(whole(archive, masked_row(archive)) == store.NO_DATA, mask != 0)


def test_defaced_voxels_stay_no_data_on_another_grid(tmp_path):
    mask = np.zeros(SHAPE, np.uint8)
    mask[:, :6] = 1
    defaced(tmp_path / "raw", mask)
    archive = prepared(tmp_path, spacing_mm=[2.0, 2.0, 2.0])
    empty = whole(archive, masked_row(archive)) == store.NO_DATA
    assert empty[:, :3].all()
    assert not empty[:, 3:].any()


def test_nan_and_mask_add_up(tmp_path):
    root = defaced(tmp_path / "raw", box_label())
    volume = body(1)
    volume[0, 0, 0] = np.nan
    save(root / "a.nii.gz", volume)
    archive = prepared(tmp_path)
    empty = whole(archive, masked_row(archive)) == store.NO_DATA
    np.testing.assert_array_equal(empty, (box_label() != 0) | np.isnan(volume))


@pytest.mark.parametrize(
    ("mask", "grid", "reason"),
    [
        (np.zeros((5, 6, 7), np.uint8), None, "mask grid differs from its scan: shape 5×6×7"),
        (box_label(), affine(origin=(3.0, 0.0, 0.0)), "mask grid differs from its scan: same shape"),
        (body(3) / 7, None, "a label map must hold whole numbers"),
        (np.ones(SHAPE, np.uint8), None, "it holds no data"),
    ],
)
def test_a_scan_goes_with_its_mask(tmp_path, mask, grid, reason):
    defaced(tmp_path / "raw", mask, grid)
    archive = prepared(tmp_path)
    assert len(archive.scans) == 1
    dropped = (tmp_path / "out" / "dropped.csv").read_text()
    assert reason in dropped


def test_a_mask_that_changed_makes_the_volume_anew(tmp_path):
    root = defaced(tmp_path / "raw", box_label())
    prepared(tmp_path)
    wider = box_label()
    wider[:4] = 1
    save(root / "mask.nii.gz", wider)
    archive = prepared(tmp_path)
    stored = whole(archive, masked_row(archive))
    np.testing.assert_array_equal(stored == store.NO_DATA, wider != 0)


def test_nothing_of_a_person_reaches_the_archive(tmp_path):
    defaced(tmp_path / "raw", box_label())
    prepared(tmp_path)
    for path in Path(tmp_path / "out").rglob("*"):
        if path.is_file() and path.parent.name != "private":
            content = path.read_bytes()
            assert b"sub-01" not in content, path
            assert b"mask.nii" not in content, path
