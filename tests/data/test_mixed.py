"""A heap of data sets below one root."""

import csv
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from medseg_ssl.config import Block, ConfigError, UserError
from medseg_ssl.data.archive import Archive
from medseg_ssl.data.prepare import PrepareConfig, prepare
from medseg_ssl.data.recipe import without_names
from medseg_ssl.data.sources.base import Source
from tests.data.dicom_files import places, write_series
from tests.data.scans import body, msd_task, save
from tests.data.test_dicom import noise


def listing(root, **options):
    cls, config = Block(name="mixed", **options).resolve("medseg_ssl.data.sources", Source, prefix="source")
    return cls(config).list(root)


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def heap(root):
    msd_task(root / "task", cases=3, test=1)
    touch(root, "study/dataset_description.json", "study/sub-01/anat/sub-01_T1w.nii.gz")
    (root / "study/dataset_description.json").write_text('{"Name": "s", "BIDSVersion": "1.8.0"}')
    touch(
        root,
        "brains/p7_T1.nii.gz",
        "brains/p7_FLAIR.nii.gz",
        "brains/p8/t1c.nii.gz",
        "brains/p8/p8_lesion.nii.gz",
    )
    for number, path in enumerate(write_series(root / "export/a", noise(6, 4, 4), places(6), subject="P1")):
        if number % 2:
            path.rename(root / ("brains" if number == 1 else "export") / f"IM{number}")
    touch(root, "README.md", "brains/notes.txt")
    return root


def test_each_set_is_read_by_its_own_source(tmp_path):
    found = listing(heap(tmp_path))
    kinds = sorted((c.scans[0].subject, c.scans[0].modality, c.scans[0].contrast) for c in found.cases)
    assert ("brains/p7", "MR", "FLAIR") in kinds
    assert ("brains/p7", "MR", "T1w") in kinds
    assert ("brains/p8", "MR", "T1w+C") in kinds
    assert ("study/sub-01", "MR", "T1w") in kinds
    assert sum(subject.startswith("task/") for subject, *_ in kinds) == 4
    assert len(found.test_subjects) == 1
    assert not any(case.label for case in found.cases)
    reasons = {path.name: reason for path, reason in found.rejected}
    assert "a label or mask by its name" in reasons["p8_lesion.nii.gz"]
    assert sum(reason.startswith("a label;") for _, reason in found.rejected) == 3


def test_a_series_scattered_over_folders_is_one_scan(tmp_path):
    found = listing(heap(tmp_path))
    scans = [case.scans[0] for case in found.cases if case.scans[0].slices]
    assert [(len(scan.slices), scan.subject) for scan in scans] == [(6, "P1")]


def test_a_folder_can_be_explained(tmp_path):
    touch(tmp_path, "odd/7.nii.gz", "odd/8.nii.gz")
    with pytest.raises(UserError, match=r"no scan below .*does not tell its modality"):
        listing(tmp_path)
    block = {"name": "folder", "pattern": "{subject}.nii.gz", "modalities": {"CT": {"modality": "CT"}}}
    found = listing(tmp_path, folders={"odd": block})
    assert [c.scans[0].subject for c in found.cases] == ["odd/7", "odd/8"]
    with pytest.raises(UserError, match=r"source\.folders names 'old'"):
        listing(tmp_path, folders={"old": block})
    with pytest.raises(ConfigError, match=r"source\.folders\.odd\.patern"):
        listing(tmp_path, folders={"odd": {**block, "patern": "x"}})


def test_a_set_that_cannot_be_read_is_told_without_its_path(tmp_path, caplog):
    touch(tmp_path, "John Doe/imagesTr/a.nii.gz", "b_CT.nii.gz")
    (tmp_path / "John Doe/dataset.json").write_text(
        json.dumps({"training": [{"image": "x"}], "modality": {"0": "zz"}})
    )
    found = listing(tmp_path)
    assert [c.scans[0].modality for c in found.cases] == ["CT"]
    assert {p.name for p, _ in found.rejected} == {"a.nii.gz", "dataset.json"}
    assert not any("Doe" in reason for _, reason in found.rejected)
    assert "is left out" in caplog.text


def test_subjects_can_be_reserved_for_test(tmp_path):
    touch(tmp_path, "a/p1_CT.nii.gz", "a/p2_CT.nii.gz")
    assert listing(tmp_path, test_subjects=["a/p2"]).test_subjects == {"a/p2"}
    with pytest.raises(UserError, match=r"source\.test_subjects names 'p2'"):
        listing(tmp_path, test_subjects=["p2"])


def test_folders_of_days_and_kinds_are_no_subjects(tmp_path):
    """One person is one subject over days and contrasts, and a whole site is not one."""
    touch(tmp_path, "p01/day1/T1.nii.gz", "p01/day2/T1.nii.gz", "p01/flair/FLAIR.nii.gz", "p01/T2.nii.gz")
    touch(tmp_path, "site/p01/mri/T1.nii.gz", "site/p02/mri/T1.nii.gz", "site/p02/20200131/CT.nii.gz")
    touch(tmp_path, "set/day1/p3_T1.nii.gz", "T1/baseline/T1.nii.gz")
    touch(tmp_path, "hospital/12345678/T1.nii.gz", "hospital/87654321/T1.nii.gz", "trial/scan_001/T1.nii.gz")
    listed = listing(tmp_path)
    found = {c.name: c.scans[0].subject for c in listed.cases}
    assert {
        found[f"p01/{n}"] for n in ("day1/T1.nii.gz", "day2/T1.nii.gz", "flair/FLAIR.nii.gz", "T2.nii.gz")
    } == {"p01/p01"}
    assert found["site/p01/mri/T1.nii.gz"] == "site/p01"
    assert {found["site/p02/mri/T1.nii.gz"], found["site/p02/20200131/CT.nii.gz"]} == {"site/p02"}
    assert found["set/day1/p3_T1.nii.gz"] == "set/p3"
    numbers = ("hospital/12345678", "hospital/87654321", "trial/scan_001")
    assert [found[f"{n}/T1.nii.gz"] for n in numbers] == list(numbers), (
        "these are names of subjects, not days"
    )
    [(path, reason)] = [r for r in listed.rejected if r[0].name == "T1.nii.gz"]
    assert path.parent.name == "baseline"
    assert reason == "neither its name nor its folders tell whose scan it is; source.folders can explain them"


def test_an_archive_of_an_earlier_version_goes_on(tmp_path):
    """Its recipe held an empty list that no recipe holds any more."""
    save(tmp_path / "raw/a/p1_T1.nii.gz", body(1))
    config = PrepareConfig.model_validate(
        {"source": {"name": "mixed"}, "split": {"test": 0, "development": 0}}
    )
    out = prepare(config, [tmp_path / "raw"], tmp_path / "out")
    for file, at in (
        (out / "archive.json", ("recipe", "source")),
        (out / "private/recipe.json", ("source",)),
    ):
        tree = json.loads(file.read_text())
        block = tree
        for key in at:
            block = block[key]
        block["dicom"]["test_subjects"] = []
        file.write_text(json.dumps(tree))
    assert len(Archive.open(prepare(config, [tmp_path / "raw"], out)).scans) == 1


def test_patients_reserved_for_test_stand_in_one_place_and_in_no_archive():
    tree = {"source": {"name": "mixed", "dicom": {"test_subjects": ["DOE^JOHN"]}}}
    with pytest.raises(ConfigError, match=r"give the patients reserved for test in source\.test_subjects"):
        PrepareConfig.model_validate(tree).recipe()
    names = {
        "dicom": {"test_subjects": ["DOE^JOHN"], "minimum_slices": 8},
        "test_subjects": ["a"],
        "folders": {},
    }
    assert without_names(names) == {"dicom": {"minimum_slices": 8}}


def test_names_of_folders_stay_out_of_the_recipe():
    block = {"name": "folder", "pattern": "{subject}.nii.gz", "modalities": {"CT": {"modality": "CT"}}}
    config = PrepareConfig.model_validate(
        {"source": {"name": "mixed", "folders": {"clinic of Dr Doe": block}}}
    )
    assert "Doe" not in config.recipe().model_dump_json()


@pytest.mark.realdata
def test_all_real_sets_thrown_together(real_data, tmp_path):
    """One command over a heap of every layout: each file is a scan or has a reason, and the page is there."""
    folders = {
        "ct_unlabeled": {
            "name": "folder",
            "pattern": "{subject}.nii.gz",
            "modalities": {"CT": {"modality": "CT"}},
        }
    }
    tree = {"source": {"name": "mixed", "folders": folders}, "split": {"test": 0, "development": 0}}
    out = prepare(PrepareConfig.model_validate(tree), [real_data], tmp_path / "out", workers=2)
    archive = Archive.open(out)
    with (out / "private" / "sources.csv").open(newline="") as file:
        places = {key: Path(place.split("#")[0]) for key, place in list(csv.reader(file))[2:]}
    by_top = Counter(places[key].relative_to(real_data).parts[0] for key in archive.scans)
    assert by_top["msd_hippocampus"] == 180
    assert by_top["openkbp_ct"] >= 52
    assert by_top["ct_unlabeled"] == 3
    assert by_top["sts_ct_pet_mr"] == 108
    assert {"dicom_odd", "bids_real", "open_ms_mr", "brain_tumor_4contrast"} <= set(by_top)
    with (out / "dropped.csv").open(newline="") as file:
        dropped = dict(list(csv.reader(file))[1:])
    assert set(places) == set(archive.scans) | set(dropped)
    assert not set(archive.scans) & set(dropped)
    volumes = {
        path for path in real_data.rglob("*") if path.name.endswith((".nii", ".nii.gz", ".mha", ".mgz"))
    }
    assert volumes <= set(places.values())
    page = (out / "overview.html").read_text()
    assert "maybe one subject under two names" in page, "STS_002 is there three times"
    assert str(real_data) not in page
    assert not re.search(r"STS_0\d\d|sub-unf|patient\d", page)
