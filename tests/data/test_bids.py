import csv
import json
import os

import pytest

from medseg_ssl.config import ConfigError, UserError, parse
from medseg_ssl.data.archive import Archive
from medseg_ssl.data.prepare import PrepareConfig, prepare
from medseg_ssl.data.sources import _bids_tree
from tests.data.scans import body, box_label, save
from tests.data.test_sources import listing, touch

DESCRIPTION = '{"Name": "made up", "BIDSVersion": "1.10.0"}'
CORD = {"labels": ["seg-manual"], "classes": {1: "cord"}}


def dataset(root, *names, description=DESCRIPTION):
    root.mkdir(parents=True, exist_ok=True)
    (root / "dataset_description.json").write_text(description)
    return touch(root, *names)


def anat(name, subject="01", session=""):
    """Path of a file in its place: ``T1w`` to ``sub-01/anat/sub-01_T1w.nii.gz``."""
    folders = "/".join(filter(None, (f"sub-{subject}", session and f"ses-{session}", "anat")))
    stem = "_".join(filter(None, (f"sub-{subject}", session and f"ses-{session}", name)))
    return f"{folders}/{stem}.nii.gz"


def found(root, **options):
    return listing(root, name="bids", **options)


def scans(listed):
    return {case.scans[0].path.name: case.scans[0] for case in listed.cases}


def reasons(listed):
    return {path.name: reason for path, reason in listed.rejected}


def labels(listed):
    return {case.scans[0].path.name: case.label.name if case.label else None for case in listed.cases}


def sidecar(root, scan, **content):
    path = root / scan.replace(".nii.gz", ".json")
    path.write_text(json.dumps(content))
    return path


# -- what a name means -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "modality", "contrast"),
    [
        ("T1w", "MR", "T1w"),
        ("acq-sag_run-2_T2w", "MR", "T2w"),
        ("T2star", "MR", "T2starw"),
        ("T2starw", "MR", "T2starw"),
        ("FLAIR", "MR", "FLAIR"),
        ("PDw", "MR", "PDw"),
        ("angio", "MR", "angio"),
        ("FLASH", "MR", ""),
        ("part-mag_T1w", "MR", "T1w"),
        ("ce-gadolinium_T1w", "MR", "T1w+C"),
        ("ce-none_T1w", "MR", "T1w"),
        ("ce-gad_FLAIR", "MR", "FLAIR+C"),
        ("ct", "CT", ""),
        ("trc-18FFDG_pet", "PT", "FDG"),
        ("trc-PiB_pet", "PT", "PiB"),
        ("pet", "PT", ""),
    ],
)
def test_suffix_and_entities_tell_the_kind(tmp_path, name, modality, contrast):
    [scan] = scans(found(dataset(tmp_path, anat(name)))).values()
    assert (scan.modality, scan.contrast) == (modality, contrast)
    assert scan.unit == {"CT": "HU"}.get(modality, "raw")
    assert (scan.subject, scan.study, scan.frame, scan.token) == ("sub-01", "", "", name)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("task-rest_bold", "several volumes in one file"),
        ("dwi", "several volumes in one file"),
        ("asl", "several volumes in one file"),
        ("T1map", "a quantitative map"),
        ("MTRmap", "a quantitative map"),
        ("mt-on_MTR", "a source image of a quantitative map"),
        ("echo-1_MEGRE", "a source image of a quantitative map"),
        ("phasediff", "a field map"),
        ("mod-T1w_defacemask", "a mask or segmentation"),
        ("part-phase_T2starw", "the phase, real or imaginary part"),
        ("part-imag_T1w", "the phase, real or imaginary part"),
    ],
)
def test_what_is_no_scan_says_why(tmp_path, name, reason):
    root = dataset(tmp_path, anat(name), anat("T1w", "02"))
    listed = found(root)
    assert list(scans(listed)) == ["sub-02_T1w.nii.gz"]
    assert reasons(listed)[f"sub-01_{name}.nii.gz"].startswith(reason)


def test_a_map_is_taken_where_the_config_says_what_it_is(tmp_path):
    kinds = {"T1map": {"modality": "MR", "contrast": "T1map"}}
    [scan] = scans(found(dataset(tmp_path, anat("T1map")), modalities=kinds)).values()
    assert scan.contrast == "T1map"


def test_unknown_suffix_is_rejected_with_the_choices_and_without_a_name(tmp_path):
    listed = found(dataset(tmp_path, anat("T1w"), anat("DOEJANE"), anat("acq-DOE_XRAY"), anat("DOE JANE")))
    rejected = reasons(listed)
    assert "none of the known ones: T1w, inplaneT1, T2w" in rejected["sub-01_DOEJANE.nii.gz"]
    assert rejected["sub-01_DOE JANE.nii.gz"].startswith("its name is none of BIDS")
    assert len(rejected) == 3
    assert not [reason for reason in rejected.values() if "DOE" in reason]


def test_only_the_suffixes_asked_for(tmp_path):
    listed = found(dataset(tmp_path, anat("T1w"), anat("T2w")), suffixes=["T2w"])
    assert list(scans(listed)) == ["sub-01_T2w.nii.gz"]
    assert reasons(listed) == {"sub-01_T1w.nii.gz": "its suffix is none of source.suffixes: T2w"}


# -- where a file lies -----------------------------------------------------------------------------------------------


def test_sessions_are_studies(tmp_path):
    listed = found(dataset(tmp_path, anat("T1w", session="a"), anat("T1w", session="b")))
    assert {scan.study for scan in scans(listed).values()} == {"ses-a", "ses-b"}
    assert {scan.subject for scan in scans(listed).values()} == {"sub-01"}


def test_data_sets_below_a_root_have_subjects_of_their_own(tmp_path):
    dataset(tmp_path / "one", anat("T1w"))
    dataset(tmp_path / "one" / "inner", anat("T2w"))
    dataset(tmp_path / "one" / "derivatives" / "made", anat("FLAIR"))
    listed = found(tmp_path)
    assert {(s.subject, s.study) for s in scans(listed).values()} == {
        ("one/sub-01", "one"),
        ("one/inner/sub-01", "one/inner"),
    }
    assert list(reasons(listed)) == ["sub-01_FLAIR.nii.gz"]
    shared = found(tmp_path, shared_subjects=True)
    assert {(s.subject, s.study) for s in scans(shared).values()} == {
        ("sub-01", "one"),
        ("sub-01", "one/inner"),
    }


def test_a_root_without_description_needs_subjects(tmp_path):
    touch(tmp_path, anat("T1w"))
    assert len(found(tmp_path).cases) == 1
    with pytest.raises(UserError, match=r"no scan below .*no dataset_description\.json and no folder sub-"):
        found(touch(tmp_path / "other", "scan.nii.gz").parent / "other")


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("sourcedata/sub-01/anat/sub-01_T1w.nii.gz", "it does not lie in sub-"),
        ("sub-01/sub-01_T1w.nii.gz", "it does not lie in sub-"),
        ("sub-01/anat/sub-02_T1w.nii.gz", "its name and its folders tell different subjects"),
        ("sub-01/ses-1/anat/sub-01_T1w.nii.gz", "its name and its folders tell different subjects"),
        ("sub-01/anat/T1w.nii.gz", "its name is none of BIDS"),
    ],
)
def test_files_out_of_place(tmp_path, path, reason):
    listed = found(dataset(tmp_path, path, anat("T1w", "03")))
    assert len(listed.cases) == 1
    [(_, why)] = listed.rejected
    assert why.startswith(reason)


def test_content_that_was_not_fetched_is_named(tmp_path):
    dataset(tmp_path, anat("T1w"), ".git/annex/objects/key.nii.gz")
    (tmp_path / anat("T2w")).symlink_to(tmp_path / ".git" / "annex" / "gone")
    listed = found(tmp_path)
    assert len(listed.cases) == 1
    assert list(reasons(listed)) == ["sub-01_T2w.nii.gz"]
    assert "broken link" in reasons(listed)["sub-01_T2w.nii.gz"]


def test_linked_folders_are_followed_but_not_in_a_circle(tmp_path):
    dataset(tmp_path / "real", anat("T1w"))
    dataset(tmp_path / "tree")
    (tmp_path / "tree" / "sub-01").symlink_to(tmp_path / "real" / "sub-01")
    (tmp_path / "tree" / "again").symlink_to(tmp_path / "tree")
    assert len(found(tmp_path / "tree").cases) == 1


def test_a_folder_that_cannot_be_read_is_left_out(tmp_path, monkeypatch, caplog):
    dataset(tmp_path, anat("T1w"))
    (tmp_path / "lost+found").mkdir()
    (tmp_path / "itself").symlink_to(tmp_path / "itself")
    scan = os.scandir

    def refused(path):
        if str(path).endswith("lost+found"):
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", refused)
    assert len(found(tmp_path).cases) == 1
    assert "left out: cannot read the folder" in caplog.text


# -- sidecars --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("units", "unit"),
    [
        ("SUV", "SUV"),
        ("SUVbw", "SUV"),
        ("SUV (g/mL)", "SUV"),
        ("Bq/mL", "raw"),
        ("g/mL", "raw"),
        ("SUVlbm", "raw"),
        ("SUVR", "raw"),
        (3, "raw"),
    ],
)
def test_a_pet_is_suv_only_where_its_sidecar_says_so(tmp_path, units, unit):
    root = dataset(tmp_path, anat("pet"))
    sidecar(root, anat("pet"), Units=units, TracerName="[18F]fluorodeoxyglucose", FrameTimesStart=[0])
    [scan] = scans(found(root)).values()
    assert (scan.unit, scan.contrast) == (unit, "FDG")


def test_the_scanner_stands_in_the_sidecar(tmp_path):
    root = dataset(tmp_path, anat("T1w"), anat("T2w"))
    sidecar(root, anat("T1w"), Manufacturer="Siemens", ManufacturersModelName="Prisma_fit", StationName="Doe")
    sidecar(root, anat("T2w"), Manufacturer=7)
    assert sorted(scan.scanner for scan in scans(found(root)).values()) == ["", "siemens prisma fit"]


def test_a_dynamic_pet_is_no_scan(tmp_path):
    root = dataset(tmp_path, anat("pet"), anat("T1w"))
    sidecar(root, anat("pet"), FrameTimesStart=[0, 60, 120])
    assert reasons(found(root))["sub-01_pet.nii.gz"].startswith("a dynamic series of 3 time frames")


def test_sidecars_are_inherited(tmp_path):
    root = dataset(tmp_path, anat("T1w"), anat("acq-post_T1w"), anat("T2w"), anat("acq-post_T1w", "02"))
    (root / "acq-post_T1w.json").write_text('{"ContrastBolusIngredient": "GADOLINIUM"}')
    # the nearer file goes before the farther
    (root / "sub-02" / "sub-02_T1w.json").write_text('{"ContrastBolusIngredient": "none"}')
    assert {name: scan.contrast for name, scan in scans(found(root)).items()} == {
        "sub-01_T1w.nii.gz": "T1w",
        "sub-01_acq-post_T1w.nii.gz": "T1w+C",
        "sub-01_T2w.nii.gz": "T2w",
        "sub-02_acq-post_T1w.nii.gz": "T1w",
    }


def test_frame_of_reference_only_from_the_own_sidecar(tmp_path):
    root = dataset(tmp_path, anat("T1w"), anat("T2w"), anat("FLAIR"))
    (root / "T2w.json").write_text('{"FrameOfReferenceUID": "1.2.3"}')
    sidecar(root, anat("T1w"), FrameOfReferenceUID="1.2.3")
    sidecar(root, anat("FLAIR"), FrameOfReferenceUID=7)
    frames = {name: scan.frame for name, scan in scans(found(root)).items()}
    assert frames == {"sub-01_T1w.nii.gz": "1.2.3", "sub-01_T2w.nii.gz": "", "sub-01_FLAIR.nii.gz": ""}


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"{", "no valid JSON"),
        (b"[]", "must hold a mapping, found list"),
        (b"\xff\xfe\x00", "no UTF-8 text"),
        (b"[" * 100_000, "nested too deeply"),
        (b" " * 200, "more than the 100 that are read"),
    ],
)
def test_a_broken_sidecar_is_a_reason_and_no_crash(tmp_path, monkeypatch, content, why):
    if b" " in content:
        monkeypatch.setattr(_bids_tree, "SIDECAR_BYTES", 100)
    root = dataset(tmp_path, anat("T1w"))
    sidecar(root, anat("T1w")).write_bytes(content)
    listed = found(root)
    assert len(listed.cases) == 1
    assert why in reasons(listed)["sub-01_T1w.json"]


def test_a_broken_description_still_makes_a_data_set(tmp_path):
    listed = found(dataset(tmp_path / "a", anat("T1w"), description="{").parent)
    assert len(listed.cases) == 1
    assert "says nothing: it is no valid JSON" in reasons(listed)["dataset_description.json"]


# -- derivatives -----------------------------------------------------------------------------------------------------


def derived(name, derivative="manual", **place):
    return f"derivatives/{derivative}/{anat(name, **place)}"


def test_labels_by_the_name_of_the_scan(tmp_path):
    root = dataset(
        tmp_path, anat("T1w"), anat("T2w"), derived("T1w_seg-manual"), derived("T1w_lesion-manual")
    )
    listed = found(root, **CORD)
    assert labels(listed) == {
        "sub-01_T1w.nii.gz": "sub-01_T1w_seg-manual.nii.gz",
        "sub-01_T2w.nii.gz": None,
    }
    assert listed.classes == {0: "background", 1: "cord"}
    assert list(reasons(listed)) == ["sub-01_T1w_lesion-manual.nii.gz"]
    assert "source.labels" in reasons(listed)["sub-01_T1w_lesion-manual.nii.gz"]


@pytest.mark.parametrize(
    ("pattern", "file"),
    [
        ("dseg", "acq-sag_dseg"),
        ("desc-manual_dseg", "acq-sag_desc-manual_dseg"),
        ("desc-*_mask", "acq-sag_desc-lesion_mask"),
        ("manual/label-SC_seg", "acq-sag_T2w_label-SC_seg"),
    ],
)
def test_labels_by_the_entities_of_the_scan(tmp_path, pattern, file):
    root = dataset(tmp_path, anat("acq-sag_T2w"), anat("T2w"), derived(file))
    listed = found(root, labels=[pattern], classes={1: "cord"})
    # the scan without acq- has other entities
    assert labels(listed) == {"sub-01_acq-sag_T2w.nii.gz": f"sub-01_{file}.nii.gz", "sub-01_T2w.nii.gz": None}


def test_the_label_of_another_run_is_no_label(tmp_path):
    root = dataset(tmp_path, anat("T1w"), derived("run-2_dseg"))
    listed = found(root, labels=["*dseg"], classes={1: "cord"})
    assert labels(listed) == {"sub-01_T1w.nii.gz": None}
    assert list(reasons(listed)) == ["sub-01_run-2_dseg.nii.gz"]


def test_labels_stay_in_their_session_and_data_set(tmp_path):
    dataset(tmp_path / "a", anat("T1w", session="1"), derived("T1w_seg-manual", session="2"))
    dataset(tmp_path / "b", anat("T1w", session="2"))
    listed = found(tmp_path, **CORD)
    assert set(labels(listed).values()) == {None}


def test_a_label_that_could_be_two_scans(tmp_path):
    root = dataset(tmp_path, anat("T1w"), anat("T2w"), derived("dseg"))
    listed = found(root, labels=["dseg"], classes={1: "cord"})
    assert set(labels(listed).values()) == {None}
    assert "the label of 2 scans; source.labeled chooses" in reasons(listed)["sub-01_dseg.nii.gz"]
    listed = found(root, labels=["dseg"], classes={1: "cord"}, labeled=["T2w"])
    assert labels(listed)["sub-01_T2w.nii.gz"] == "sub-01_dseg.nii.gz"
    assert not listed.rejected


def test_two_labels_of_one_scan(tmp_path):
    root = dataset(tmp_path, anat("T1w"), derived("T1w_seg-manual", "one"), derived("T1w_seg-manual", "two"))
    listed = found(root, **CORD)
    assert labels(listed) == {"sub-01_T1w.nii.gz": None}
    assert [reason[:31] for _, reason in listed.rejected] == ["one of 2 labels of the same sca"] * 2
    listed = found(root, labels=["two/seg-manual"], classes={1: "cord"})
    [case] = listed.cases
    assert case.label is not None
    assert case.label.parts[-4] == "two"
    assert len(listed.rejected) == 1


def test_the_first_of_several_labels_is_taken(tmp_path):
    root = dataset(tmp_path, anat("T1w"), derived("T1w_seg-auto"), derived("T1w_seg-manual"))
    listed = found(root, labels=["seg-manual", "seg-auto"], classes={1: "cord"})
    assert labels(listed) == {"sub-01_T1w.nii.gz": "sub-01_T1w_seg-manual.nii.gz"}
    assert list(reasons(listed)) == ["sub-01_T1w_seg-auto.nii.gz"]


def test_a_derivative_named_for_it_holds_scans_with_labels_of_their_own(tmp_path):
    root = dataset(
        tmp_path,
        anat("T1w"),
        derived("desc-preproc_T1w", "prep"),
        derived("dseg", "prep"),
        derived("desc-preproc_T1w", "other"),
    )
    sidecar(root, derived("desc-preproc_T1w", "prep"), FrameOfReferenceUID="1.2.3")
    listed = found(root, derivatives=["prep"], labels=["dseg"], classes={1: "cord"})
    assert labels(listed) == {
        "sub-01_T1w.nii.gz": None,
        "sub-01_desc-preproc_T1w.nii.gz": "sub-01_dseg.nii.gz",
    }
    # what was resampled left the scanner's frame
    assert {(s.subject, s.frame) for s in scans(listed).values()} == {("sub-01", "")}
    assert [path.parts[-4] for path, _ in listed.rejected] == ["other"]


def test_a_data_set_that_calls_itself_a_derivative(tmp_path):
    dataset(tmp_path / "raw", anat("T1w"))
    dataset(tmp_path / "prep", anat("T1w"), description='{"DatasetType": "derivative"}')
    assert {s.subject for s in scans(found(tmp_path)).values()} == {"raw/sub-01"}
    assert len(found(tmp_path, derivatives=["prep"]).cases) == 2
    with pytest.raises(
        UserError, match=r"of 1 files none is one; sub-01_T1w.nii.gz: it lies in a derivative"
    ):
        found(tmp_path / "prep")


# -- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"suffixes": ["T1"]}, "suffixes names 'T1'; known suffixes: T1w, inplaneT1"),
        ({"labeled": ["T1"]}, "labeled names 'T1'"),
        ({"labels": ["seg-manual"]}, "labels needs classes"),
        ({"labels": ["../a/b"], "classes": {1: "cord"}}, "write what follows the scan's name"),
        ({"labels": ["seg.nii.gz"], "classes": {1: "cord"}}, r"without \.nii\.gz"),
    ],
)
def test_wrong_options(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        found(tmp_path, **options)


def test_subjects_reserved_for_test(tmp_path):
    root = dataset(tmp_path, anat("T1w"), anat("T1w", "02"))
    assert found(root, test_subjects=["sub-02"]).test_subjects == {"sub-02"}
    with pytest.raises(UserError, match="test_subjects names '02', which is not below"):
        found(root, test_subjects=["02"])


# -- into an archive -------------------------------------------------------------------------------------------------


def prepared(root, out, **options):
    block = {"source": {"name": "bids", **options}, "split": {"test": 0, "development": 0}}
    return Archive.open(prepare(parse(PrepareConfig, block), [root], out))


def files(archive, root):
    """Kept files, and dropped ones with the reason; paths below the root."""
    with (archive.path / "private" / "sources.csv").open() as stream:
        paths = {key: path for key, path in list(csv.reader(stream))[1:]}
    with (archive.path / "dropped.csv").open() as stream:
        dropped = {row["key"]: row["reason"] for row in csv.DictReader(stream)}
    above = f"{root.resolve()}/"
    # the list holds the salt too
    shown = {key: path.removeprefix(above) for key, path in paths.items() if path.startswith(above)}
    return (
        {path for key, path in shown.items() if key not in dropped},
        {shown[key]: reason for key, reason in dropped.items()},
    )


def test_a_tree_becomes_an_archive_that_names_nobody(tmp_path):
    root = dataset(tmp_path / "raw")
    for i in (1, 2):
        save(root / anat("T1w", f"0{i}"), body(i))
        save(root / anat("T2w", f"0{i}"), body(10 + i))
        save(root / derived("T1w_seg-manual", subject=f"0{i}"), box_label())
    (root / "participants.tsv").write_text("participant_id\tname\nsub-01\tERIKA\n")
    sidecar(root, anat("T1w"), PatientName="ERIKA", FrameOfReferenceUID="1.2.3.4")
    sidecar(root, anat("T2w"), FrameOfReferenceUID="1.2.3.4")
    archive = prepared(root, tmp_path / "out", **CORD)
    assert sorted(case.labeled for case in archive.cases.values()) == [False, False, True, True]
    assert sorted(pair.relation for pair in archive.pairs) == ["same_frame", "same_study"]
    for path in (tmp_path / "out").rglob("*"):
        if path.is_file() and path.parent.name != "private":
            content = path.read_bytes()
            assert not [word for word in (b"ERIKA", b"sub-0", b"1.2.3.4") if word in content], path


@pytest.mark.realdata
def test_real_tree(real_data, tmp_path):
    root = real_data / "bids_real"
    archive = prepared(root, tmp_path / "out", **CORD, labeled=["T1w", "T2w", "T2star"])
    kept, dropped = files(archive, root)
    assert kept | set(dropped) == {p.relative_to(root).as_posix() for p in root.rglob("*.nii.gz")}
    assert len(archive.scans) == 10
    assert len({row.subject for row in archive.scans.values()}) == 4
    assert sorted((r.modality, r.contrast) for r in archive.scans.values()) == sorted(
        [("CT", ""), *[("MR", c) for c in ("T1w", "T2w", "T2starw")] * 3]
    )
    assert sum(case.labeled for case in archive.cases.values()) == 3
    # the others are labels nobody asked for
    assert len(dropped) == 9
    assert all("lies in a derivative" in reason for reason in dropped.values())
