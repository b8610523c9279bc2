import json

import numpy as np
import pytest

from medseg_ssl.config import Block, ConfigError, UserError, shelf
from medseg_ssl.data.sources._kinds import Kind, kind_of
from medseg_ssl.data.sources._labels import subject_of
from medseg_ssl.data.sources.base import Source
from tests.data.scans import FOLDER, LABELED_FOLDER, body, box_label, folder_tree, msd_task, save

SHELF = "medseg_ssl.data.sources"


def listing(root, **block):
    cls, config = Block(**block).resolve(SHELF, Source, prefix="source")
    return cls(config).list(root)


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def tokens(found):
    return sorted((c.scans[0].subject, c.scans[0].study, c.scans[0].token) for c in found.cases)


# -- all sources -----------------------------------------------------------------------------------------------------


def blocks(name):
    return FOLDER if name == "folder" else {"name": name}


@pytest.mark.parametrize("name", shelf(SHELF))
def test_missing_root_is_named(name, tmp_path):
    with pytest.raises(UserError, match=r"no folder .*nothing"):
        listing(tmp_path / "nothing", **blocks(name))


@pytest.mark.parametrize("name", shelf(SHELF))
def test_empty_root_is_refused(name, tmp_path):
    with pytest.raises(UserError, match=r"no scan below|no dataset\.json"):
        listing(tmp_path, **blocks(name))


def test_files_behind_links_are_found_once_and_broken_links_told(tmp_path):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    touch(root, "p1/CT.nii.gz")
    touch(elsewhere, "CT.nii.gz", "MR.nii.gz")
    (root / "p2").symlink_to(elsewhere)
    (root / "p1" / "round").symlink_to(root)
    (root / "again").symlink_to(root / "p1")
    (root / "a").symlink_to(root / "a")
    (root / "p3").mkdir()
    (root / "p3" / "CT.nii.gz").symlink_to(tmp_path / "gone")
    (root / "p3" / "MR.nii.gz").symlink_to(elsewhere / "MR.nii.gz")
    cls, config = Block(**FOLDER).resolve(SHELF, Source, prefix="source")
    found = [path.relative_to(root).as_posix() for path in cls(config).files(root)]
    assert found == ["a", "p1/CT.nii.gz", "p2/CT.nii.gz", "p2/MR.nii.gz", "p3/CT.nii.gz", "p3/MR.nii.gz"]


@pytest.mark.parametrize("name", shelf(SHELF))
def test_unknown_option_is_refused_with_the_nearest(name, tmp_path):
    with pytest.raises(
        ConfigError, match=r"unknown key 'source\.test_subject' \(did you mean 'test_subjects'"
    ):
        listing(tmp_path, **blocks(name), test_subject=["a"])


# -- folder ----------------------------------------------------------------------------------------------------------


def test_pattern_takes_the_longest_modality_token(tmp_path):
    touch(tmp_path, "STS_001_CT.nii.gz", "STS_001_MR_T1.nii.gz", "README.md", ".hidden.nii.gz")
    modalities = {**FOLDER["modalities"], "T1": {"modality": "MR"}}
    found = listing(tmp_path, **{**FOLDER, "modalities": modalities})
    assert tokens(found) == [("STS_001", "", "CT"), ("STS_001", "", "MR_T1")]
    assert not found.rejected
    assert [c.scans[0].unit for c in found.cases] == ["HU", "raw"]


def test_unknown_modality_is_rejected_with_the_choices(tmp_path):
    touch(tmp_path, "a_CT.nii.gz", "a_US.nii.gz", "odd.nii.gz")
    reasons = {path.name: reason for path, reason in listing(tmp_path, **FOLDER).rejected}
    assert reasons["a_US.nii.gz"] == "its modality is none of source.modalities; known: CT, PET, MR_T1"
    assert "does not match" in reasons["odd.nii.gz"]


def test_reasons_hold_no_part_of_a_name(tmp_path):
    touch(tmp_path, "a_CT.nii.gz", "DOE_JANE_US.nii.gz", "DOE JANE.nii.gz")
    rejected = dict((path.name, reason) for path, reason in listing(tmp_path, **FOLDER).rejected)
    assert set(rejected) == {"DOE_JANE_US.nii.gz", "DOE JANE.nii.gz"}
    assert not [reason for reason in rejected.values() if "JANE" in reason or "DOE" in reason]


def test_labels_are_no_scans_and_belong_to_every_scan_of_the_study(tmp_path):
    touch(tmp_path, "a_CT.nii.gz", "a_PET.nii.gz", "a_GTV.nii.gz", "b_CT.nii.gz")
    found = listing(tmp_path, **LABELED_FOLDER)
    assert not found.rejected
    assert {c.name: c.label.name if c.label else None for c in found.cases} == {
        "a/CT": "a_GTV.nii.gz",
        "a/PET": "a_GTV.nii.gz",
        "b/CT": None,
    }
    assert found.classes == {0: "background", 1: "GTV"}
    assert found.relation == "registered"


def test_only_chosen_scans_carry_the_label(tmp_path):
    touch(tmp_path, "a_CT.nii.gz", "a_PET.nii.gz", "a_GTV.nii.gz")
    found = listing(tmp_path, **LABELED_FOLDER, labeled=["CT"])
    assert {c.name for c in found.cases if c.label} == {"a/CT"}


def test_channels_make_one_case_per_study(tmp_path):
    touch(
        tmp_path,
        "a_CT.nii.gz",
        "a_PET.nii.gz",
        "a_MR_T1.nii.gz",
        "a_GTV.nii.gz",
        "b_CT.nii.gz",
        "b_GTV.nii.gz",
    )
    found = listing(tmp_path, **LABELED_FOLDER, channels=["PET", "CT"])
    cases = {c.name: c for c in found.cases}
    assert [s.token for s in cases["a/PET+CT"].scans] == ["PET", "CT"]
    assert [s.channel for s in cases["a/PET+CT"].scans] == [0, 1]
    assert cases["a/PET+CT"].label is not None
    # what does not fill the channels is a scan without label
    assert cases["a/MR_T1"].label is None
    assert cases["b/CT"].label is None
    assert [(path.name, reason) for path, reason in found.rejected] == [
        ("b_GTV.nii.gz", "its study lacks channels of the case: PET")
    ]


def test_studies_and_folders_in_the_pattern(tmp_path):
    touch(tmp_path, "p_1/day1/CT.nii.gz", "p_1/day2/CT.nii.gz")
    found = listing(tmp_path, **{**FOLDER, "pattern": "{subject}/{study}/{modality}.nii.gz"})
    assert tokens(found) == [("p_1", "day1", "CT"), ("p_1", "day2", "CT")]
    touch(tmp_path / "flat", "p_1_day1_CT.nii.gz", "p_1_day2_CT.nii.gz")
    found = listing(tmp_path / "flat", **{**FOLDER, "pattern": "{subject}_{study}_{modality}.nii.gz"})
    assert tokens(found) == [("p_1", "day1", "CT"), ("p_1", "day2", "CT")]


def test_the_scanner_in_the_pattern(tmp_path):
    touch(tmp_path, "Prisma 1/p_CT.nii.gz", "Skyra/q_CT.nii.gz")
    found = listing(tmp_path, **{**FOLDER, "pattern": "{scanner}/{subject}_{modality}.nii.gz"})
    assert {(c.scans[0].subject, c.scans[0].scanner) for c in found.cases} == {
        ("p", "prisma 1"),
        ("q", "skyra"),
    }


def test_regular_expression(tmp_path):
    touch(tmp_path, "ses1/pat-7.CT.nii.gz", "ses2/pat-7.XX.nii.gz")
    block = {k: v for k, v in FOLDER.items() if k != "pattern"}
    found = listing(
        tmp_path, **block, regex=r"ses(?P<study>\d)/pat-(?P<subject>\d+)\.(?P<modality>\w+)\.nii\.gz"
    )
    assert tokens(found) == [("7", "1", "CT")]
    assert found.rejected[0][1].startswith("its modality is none of source.modalities")


def test_two_files_of_one_kind_in_a_study(tmp_path):
    touch(tmp_path, "x/a_CT.nii.gz", "y/a_CT.nii.gz")
    block = {k: v for k, v in FOLDER.items() if k != "pattern"}
    found = listing(tmp_path, **block, regex=r"\w/(?P<subject>\w)_(?P<modality>\w+)\.nii\.gz")
    assert len(found.cases) == 1
    assert found.rejected[0][1].startswith("a second CT in the same study")


def test_names_that_tell_their_modality_need_no_map(tmp_path):
    touch(tmp_path, "a_CT.nii.gz", "a_T1.nii.gz", "a_flair.nii.gz", "a_seg.nii.gz")
    found = listing(tmp_path, name="folder", pattern="{subject}_{modality}.nii.gz")
    assert sorted((c.scans[0].modality, c.scans[0].contrast) for c in found.cases) == [
        ("CT", ""),
        ("MR", "FLAIR"),
        ("MR", "T1w"),
    ]
    assert len(found.rejected) == 1


def test_nothing_matches_says_why(tmp_path):
    touch(tmp_path, "a.nii.gz")
    with pytest.raises(
        UserError, match=r"of 1 volumes none matches '\{subject\}_\{modality\}.nii.gz'; a.nii.gz: "
    ):
        listing(tmp_path, **FOLDER)


def test_relations_file(tmp_path):
    touch(tmp_path, "a_d1_CT.nii.gz", "a_d1_PET.nii.gz", "a_d2_CT.nii.gz")
    (tmp_path / "relations.csv").write_text(
        "subject,a,b,relation\na,d1_CT,PET,same_frame\na,a_d1_CT.nii.gz,d2/CT,registered\n"
    )
    block = {**FOLDER, "pattern": "{subject}_{study}_{modality}.nii.gz", "relations_file": "relations.csv"}
    found = listing(tmp_path, **block)
    shown = [(r.scan_a.path.name, r.scan_b.path.name, r.relation) for r in found.relations]
    assert shown == [
        ("a_d1_CT.nii.gz", "a_d1_PET.nii.gz", "same_frame"),
        ("a_d1_CT.nii.gz", "a_d2_CT.nii.gz", "registered"),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a,CT,MR_T1,registered", r"line 2: b = 'MR_T1' names no scan of subject 'a'"),
        ("a,CT,PET,aligned", r"line 2: no relation 'aligned'; known: registered, same_frame"),
    ],
)
def test_wrong_relations_file(tmp_path, line, message):
    touch(tmp_path, "a_CT.nii.gz", "a_PET.nii.gz")
    (tmp_path / "relations.csv").write_text(f"subject,a,b,relation\n{line}\n")
    with pytest.raises(UserError, match=message):
        listing(tmp_path, **FOLDER, relations_file="relations.csv")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pattern": "{patient}.nii.gz"}, r"no field \{patient\}; known: subject, study, modality"),
        ({"pattern": "{modality}.nii.gz"}, r"must hold \{subject\}"),
        ({"regex": "(?P<subject>.)"}, "exactly one of pattern and regex"),
        ({"channels": ["CT", "US"]}, "channels names 'US'; known tokens: CT, PET, MR_T1"),
        ({"label_pattern": "{subject}.nii.gz"}, "label_pattern needs classes"),
        ({"pattern": "{subject}.nii.gz"}, "there must be exactly one modality, found 3"),
    ],
)
def test_wrong_folder_config(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        listing(tmp_path, **{**FOLDER, **change})


def test_unknown_test_subject(tmp_path):
    touch(tmp_path, "a_CT.nii.gz")
    with pytest.raises(UserError, match="test_subjects names 'b'"):
        listing(tmp_path, **FOLDER, test_subjects=["b"])


# -- Decathlon -------------------------------------------------------------------------------------------------------


def test_msd_task(tmp_path):
    found = listing(msd_task(tmp_path, 3, test=2), name="msd")
    assert [c.name for c in found.cases] == [f"case_00{i}" for i in range(5)]
    assert [c.label is not None for c in found.cases] == [True, True, True, False, False]
    assert found.test_subjects == {"case_003", "case_004"}
    assert found.classes == {0: "background", 1: "organ", 2: "tumour"}
    assert (found.cases[0].scans[0].modality, found.cases[0].scans[0].volume) == ("MR", None)


@pytest.mark.parametrize("name", ["msd", "nnunet"])
def test_a_case_reserved_for_test_stands_for_its_subject(tmp_path, name):
    root = msd_task(tmp_path, 4)
    if name == "nnunet":
        for path in (root / "imagesTr").iterdir():
            path.rename(path.with_name(path.name.replace(".nii.gz", "_0000.nii.gz")))
    options = {"subject_regex": "(?P<subject>case)_.*", "test_subjects": ["case_002"]}
    cases = listing(root, name=name, **options).cases
    subjects = {case.name: case.scans[0].subject for case in cases}
    found = listing(root, name=name, **options).test_subjects
    assert found == {subjects["case_002"]} == {"case"}
    again = listing(root, name=name, **(options | {"test_subjects": sorted(found)}))
    assert again.test_subjects == found
    assert listing(root, name=name, test_subjects=["case_02"]).unknown_test_subjects == {"case_02"}


def test_msd_channels_of_a_4d_file(tmp_path):
    msd_task(tmp_path, 1)
    task = json.loads((tmp_path / "dataset.json").read_text())
    task["modality"] = {"0": "FLAIR", "1": "t1gd", "2": "T2w"}
    (tmp_path / "dataset.json").write_text(json.dumps(task))
    found = listing(tmp_path, name="msd")
    assert [(s.contrast, s.volume, s.channel) for s in found.cases[0].scans] == [
        ("FLAIR", 0, 0),
        ("T1w+C", 1, 1),
        ("T2w", 2, 2),
    ]
    assert found.relation == "registered"


def test_msd_subjects_by_expression(tmp_path):
    found = listing(msd_task(tmp_path, 3), name="msd", subject_regex=r"(?P<subject>case)_")
    assert {c.scans[0].subject for c in found.cases} == {"case"}
    assert len({c.scans[0].study for c in found.cases}) == 3


def test_msd_neighbouring_cases_are_one_subject(tmp_path):
    """Case 1 stays alone where its neighbour is missing; 3 and 4 are one, 9 and 10 too."""
    task = json.loads((msd_task(tmp_path, 5) / "dataset.json").read_text())
    for number, to in enumerate((1, 3, 4, 9, 10)):
        for folder in ("imagesTr", "labelsTr"):
            (tmp_path / folder / f"case_{number:03d}.nii.gz").rename(
                tmp_path / folder / f"new_{to:03d}.nii.gz"
            )
    task["training"] = [
        {"image": f"./imagesTr/new_{n:03d}.nii.gz", "label": f"./labelsTr/new_{n:03d}.nii.gz"}
        for n in (1, 3, 4, 9, 10)
    ]
    (tmp_path / "dataset.json").write_text(json.dumps(task))
    scans = [c.scans[0] for c in listing(tmp_path, name="msd", cases_per_subject=2).cases]
    assert [s.subject for s in scans] == ["new_1", "new_3", "new_3", "new_9", "new_9"]
    assert len({(s.subject, s.study) for s in scans}) == 5
    assert subject_of("case_9", None, per_subject=2) == subject_of("case_10", None, per_subject=2)
    with pytest.raises(UserError, match="'left' does not"):
        subject_of("left", None, per_subject=2)
    with pytest.raises(ConfigError, match="give one"):
        listing(tmp_path, name="msd", cases_per_subject=2, subject_regex="(?P<subject>new)")


def test_msd_subject_in_train_and_test(tmp_path):
    with pytest.raises(UserError, match=r"'case' stands in imagesTr and in imagesTs.*one split only"):
        listing(msd_task(tmp_path, 2, test=1), name="msd", subject_regex=r"(?P<subject>case)_")


def test_msd_missing_and_unnamed_files(tmp_path):
    msd_task(tmp_path, 3)
    (tmp_path / "imagesTr" / "case_000.nii.gz").unlink()
    (tmp_path / "labelsTr" / "case_001.nii.gz").unlink()
    save(tmp_path / "imagesTr" / "other.nii.gz", body(9))
    found = listing(tmp_path, name="msd")
    assert [(c.name, c.label is not None) for c in found.cases] == [("case_001", False), ("case_002", True)]
    assert sorted(path.name for path, _ in found.rejected) == [
        "case_000.nii.gz",
        "case_001.nii.gz",
        "other.nii.gz",
    ]


@pytest.mark.parametrize("chosen", [[2], ["tumour"]])
def test_classes_that_may_be_unknown(tmp_path, chosen):
    assert listing(msd_task(tmp_path, 1), name="msd", unknown_when_absent=chosen).unknown_when_absent == {2}


def test_unknown_class_names_the_choices(tmp_path):
    with pytest.raises(UserError, match=r"names class 'lesion'; known: 1 \(organ\), 2 \(tumour\)"):
        listing(msd_task(tmp_path, 1), name="msd", unknown_when_absent=["lesion"])


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "no valid JSON"), ("[]", "must hold a mapping"), ("{}", "'modality' must map numbers to names")],
)
def test_broken_dataset_json(tmp_path, content, message):
    (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(UserError, match=message):
        listing(tmp_path, name="msd")


def test_a_task_cannot_name_files_outside(tmp_path):
    msd_task(tmp_path / "task", 1)
    task = json.loads((tmp_path / "task" / "dataset.json").read_text())
    task["training"][0]["image"] = "../secret.nii.gz"
    (tmp_path / "task" / "dataset.json").write_text(json.dumps(task))
    with pytest.raises(UserError, match="outside of"):
        listing(tmp_path / "task", name="msd")


# -- nnU-Net ---------------------------------------------------------------------------------------------------------


def nnunet_task(root, *, labels=None, channels=None):
    for i in range(2):
        for c in range(2):
            save(root / "imagesTr" / f"liver_{i}_{c:04d}.nii.gz", body(10 * i + c))
        save(root / "labelsTr" / f"liver_{i}.nii.gz", box_label())
    head = {
        "channel_names": channels or {"0": "CT", "1": "PET"},
        "labels": labels or {"background": 0, "tumour": 1},
        "file_ending": ".nii.gz",
    }
    (root / "dataset.json").write_text(json.dumps(head))
    return root


@pytest.mark.parametrize("labels", [{"background": 0, "tumour": 1}, {"0": "background", "1": "tumour"}])
def test_nnunet_task_with_labels_either_way_round(tmp_path, labels):
    found = listing(nnunet_task(tmp_path, labels=labels), name="nnunet")
    assert found.classes == {0: "background", 1: "tumour"}
    assert [c.name for c in found.cases] == ["liver_0", "liver_1"]
    assert [(s.modality, s.channel) for s in found.cases[0].scans] == [("CT", 0), ("PT", 1)]
    assert found.cases[0].label.name == "liver_0.nii.gz"
    assert found.relation == "registered"


def test_nnunet_ignore_label(tmp_path):
    found = listing(nnunet_task(tmp_path, labels={"background": 0, "tumour": 1, "ignore": 2}), name="nnunet")
    assert found.classes == {0: "background", 1: "tumour"}
    assert found.ignored_values == {2}


def test_nnunet_regions_are_refused(tmp_path):
    root = nnunet_task(tmp_path, labels={"background": 0, "whole": [1, 2], "core": [2]})
    with pytest.raises(UserError, match=r"region-based labels \(whole, core\) are not supported"):
        listing(root, name="nnunet")


def test_nnunet_channel_name_without_a_modality(tmp_path):
    root = nnunet_task(tmp_path, channels={"0": "zscore", "1": "CT"})
    with pytest.raises(UserError, match=r"'zscore' does not tell the modality.*source\.modalities"):
        listing(root, name="nnunet")
    found = listing(root, name="nnunet", modalities={"zscore": {"modality": "MR", "contrast": "T2w"}})
    assert found.cases[0].scans[0].contrast == "T2w"


def test_nnunet_incomplete_case_is_rejected(tmp_path):
    nnunet_task(tmp_path)
    (tmp_path / "imagesTr" / "liver_1_0001.nii.gz").unlink()
    np.testing.assert_equal(len(listing(tmp_path, name="nnunet").cases), 1)
    assert (
        listing(tmp_path, name="nnunet").rejected[0][1]
        == "its case has channels [0], dataset.json wants [0, 1]"
    )


# -- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "modality", "contrast"),
    [
        ("CT", "CT", ""),
        ("MRI", "MR", ""),
        ("T2", "MR", "T2w"),
        ("ADC", "MR", "ADC"),
        ("mr_t1ce", "MR", "T1w+C"),
        ("PET", "PT", ""),
    ],
)
def test_names_of_public_tasks(name, modality, contrast):
    kind = kind_of(name, {})
    assert (kind.modality, kind.contrast) == (modality, contrast)


def test_a_pet_is_suv_only_where_said():
    assert kind_of("PET", {}).stored_unit == "raw"
    assert Kind(modality="PT", unit="SUV").stored_unit == "SUV"


@pytest.mark.realdata
def test_real_layouts(real_data):
    assert len(listing(real_data / "msd_hippocampus", name="msd").cases) == 180
    found = listing(real_data / "sts_ct_pet_mr" / "common_grid", **LABELED_FOLDER)
    assert len(found.cases) == 105
    assert all(c.label for c in found.cases)


def test_folder_tree_of_the_other_tests(tmp_path):
    assert len(listing(folder_tree(tmp_path), **LABELED_FOLDER).cases) == 6
