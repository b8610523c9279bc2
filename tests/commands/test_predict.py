"""``predict``: label maps in the input's geometry, nothing overwritten, one line per failing file."""

import numpy as np
import pytest
import torch

from finetune.predict import check_channels, find_cases, main
from medseg_ssl.config import ConfigError, UserError
from medseg_ssl.data.nifti import original_grid, read_label, read_nifti, write_nifti
from medseg_ssl.inference.predictor import Predictor
from tests.evaluations.fakes import CT_POLICY, Threshold, affine, bright_cube, card

BOX = (slice(4, 9), slice(3, 11), slice(5, 8))
GRID = affine((2.0, 1.0, 1.0), origin=(-4.0, 3.0, 9.0))


def write_scan(path, shape=(14, 13, 12)):
    volume = bright_cube(shape, BOX)
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_nifti(path, volume, original_grid(shape, GRID)), volume


@pytest.fixture
def segmenter(monkeypatch):
    def use(**changes):
        one = Predictor(Threshold(), card(**changes))
        one.asked = {}

        def load(path, **options):
            one.asked.update(options)
            return one

        monkeypatch.setattr("medseg_ssl.inference.predictor.Predictor.load", load)
        return one

    use()
    return use


def run(tmp_path, *more, source="in", weights=b"weights"):
    (tmp_path / "s.safetensors").write_bytes(weights)
    return main([str(tmp_path / "s.safetensors"), str(tmp_path / source), str(tmp_path / "out"), *more])


def test_folder_of_files(tmp_path, segmenter):
    _, first = write_scan(tmp_path / "in" / "a.nii.gz")
    _, second = write_scan(tmp_path / "in" / "b_0000.nii", shape=(20, 13, 31))
    (tmp_path / "in" / "notes.txt").write_text("not a scan")
    out = run(tmp_path)
    assert sorted(f.name for f in out.iterdir()) == ["a.nii.gz", "b.nii.gz", "identity.json", "inputs.jsonl"]
    for name, volume in (("a", first), ("b", second)):
        label = read_label(out / f"{name}.nii.gz")
        assert np.array_equal(label.array, volume > 0)
        assert np.allclose(label.affine_44, GRID)


def test_probabilities(tmp_path, segmenter):
    _, volume = write_scan(tmp_path / "in" / "a.nii.gz")
    out = run(tmp_path, "--probabilities", source="in/a.nii.gz")
    bright = read_nifti(out / "probabilities" / "a_bright.nii.gz")
    rest = read_nifti(out / "probabilities" / "a_background.nii.gz")
    assert np.array_equal(bright.array > 0.5, volume > 0)
    assert np.allclose(bright.array + rest.array, 1.0, atol=1e-5)


def test_existing_output_is_left_alone(tmp_path, segmenter, capsys):
    write_scan(tmp_path / "in" / "a.nii.gz")
    write_scan(tmp_path / "in" / "b.nii.gz")
    run(tmp_path, source="in/b.nii.gz")
    (tmp_path / "out" / "a.nii.gz").write_bytes(b"precious")
    (tmp_path / "out" / "b.nii.gz").unlink()
    run(tmp_path)
    assert (tmp_path / "out" / "a.nii.gz").read_bytes() == b"precious"
    assert (tmp_path / "out" / "b.nii.gz").is_file()
    assert "left alone" in capsys.readouterr().err


def test_a_label_map_of_other_files_is_not_taken_for_these(tmp_path, segmenter, capsys):
    """Two sites number their patients alike; after a line that a kill cut off, too."""
    write_scan(tmp_path / "siteA" / "case_0001.nii.gz")
    write_scan(tmp_path / "siteA" / "case_0002.nii.gz")
    write_scan(tmp_path / "siteB" / "case_0001.nii.gz", shape=(14, 13, 15))
    write_scan(tmp_path / "siteB" / "first.nii.gz")
    out = run(tmp_path, source="siteA")
    before = {f.name: f.read_bytes() for f in out.iterdir()}
    told = r"label maps of other files for 1 of 2 cases: 'case_0001'; choose another folder"
    with pytest.raises(ConfigError, match=told) as caught:
        run(tmp_path, source="siteB")
    assert caught.value.code == 2
    assert {f.name: f.read_bytes() for f in out.iterdir()} == before, "nothing of the new site either"
    (tmp_path / "again").mkdir()
    for name in ("case_0001.nii.gz", "case_0002.nii.gz"):
        (tmp_path / "again" / name).write_bytes((tmp_path / "siteA" / name).read_bytes())
    run(tmp_path, source="again")
    assert "0 of 2 label maps written" in capsys.readouterr().err
    # a map that was taken away is made of the new files, and is known as theirs
    (out / "case_0001.nii.gz").unlink()
    with (out / "inputs.jsonl").open("a") as stream:
        stream.write('{"case": "case_0')
    run(tmp_path, source="siteB/case_0001.nii.gz")
    assert read_label(out / "case_0001.nii.gz").array.shape == (14, 13, 15)
    with pytest.raises(ConfigError, match="for 1 of 2 cases: 'case_0001'"):
        run(tmp_path, source="siteA")


def test_a_label_map_of_before_inputs_were_recorded_is_left_alone(tmp_path, segmenter):
    write_scan(tmp_path / "in" / "a.nii.gz")
    out = run(tmp_path)
    (out / "inputs.jsonl").unlink()
    write_scan(tmp_path / "in" / "a.nii.gz", shape=(14, 13, 15))
    run(tmp_path)
    run(tmp_path, "--probabilities")
    assert not (out / "inputs.jsonl").exists(), "nobody knows what it was made of"
    assert read_label(out / "a.nii.gz").array.shape == (14, 13, 12)


def test_probabilities_asked_for_later_are_written_beside_the_label_map(tmp_path, segmenter):
    write_scan(tmp_path / "in" / "a.nii.gz")
    out = run(tmp_path)
    (out / "a.nii.gz").write_bytes(b"precious")
    run(tmp_path, "--probabilities")
    assert len(list((out / "probabilities").iterdir())) == 2
    assert (out / "a.nii.gz").read_bytes() == b"precious"


def test_options_reach_the_predictor_and_the_folder(tmp_path, segmenter):
    one = segmenter(mirror_axes=(0,))
    write_scan(tmp_path / "in" / "a.nii.gz")
    run(tmp_path, "--flips", "--precision", "bf16", "--device", "cpu")
    assert one.asked == {"flips": True, "precision": "bf16", "device": "cpu"}
    with pytest.raises(ConfigError, match="differ in precision"):
        run(tmp_path, "--flips")
    segmenter(other_modalities=("MR",))
    for file in (tmp_path / "out").iterdir():
        file.unlink()
    run(tmp_path, "--modality", "CT")
    with pytest.raises(ConfigError, match="differ in modality"):
        run(tmp_path, "--modality", "MR")


def test_numbers_that_are_subjects_are_kept(tmp_path, segmenter):
    """amos_0001 and amos_0002 are two patients of a segmenter of one channel, whatever file is asked for."""
    for name in ("amos_0001", "amos_0002", "lone_0000", "year_2021"):
        write_scan(tmp_path / "in" / f"{name}.nii.gz")
    (tmp_path / "in" / "._amos_0001.nii.gz").write_bytes(b"of a Mac")
    for source in ("in/amos_0001.nii.gz", "in/amos_0002.nii.gz", "in"):
        out = run(tmp_path, source=source)
    found = {f.name for f in out.iterdir()} - {"identity.json", "inputs.jsonl"}
    assert found == {"amos_0001.nii.gz", "amos_0002.nii.gz", "lone.nii.gz", "year_2021.nii.gz"}


def test_another_segmenter_needs_another_folder(tmp_path, segmenter):
    write_scan(tmp_path / "in" / "a.nii.gz")
    run(tmp_path)
    before = (tmp_path / "out" / "a.nii.gz").read_bytes()
    with pytest.raises(
        ConfigError, match=r"holds other results \(they differ in segmenter.*choose another folder"
    ):
        run(tmp_path, weights=b"others")
    assert (tmp_path / "out" / "a.nii.gz").read_bytes() == before


def test_label_maps_of_nobody_knows_whom_are_not_taken_over(tmp_path, segmenter):
    write_scan(tmp_path / "in" / "a.nii.gz")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.nii.gz").write_bytes(b"precious")
    with pytest.raises(ConfigError, match="holds something else; choose a new or empty folder"):
        run(tmp_path)
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["a.nii.gz"]


def test_a_failing_file_is_one_line_and_the_others_go_on(tmp_path, segmenter, capsys):
    path, _ = write_scan(tmp_path / "in" / "a.nii.gz")
    (tmp_path / "in" / "b.nii.gz").write_bytes(path.read_bytes()[:200])
    write_scan(tmp_path / "in" / "c.nii.gz")
    with pytest.raises(UserError, match="1 of 3 cases failed") as caught:
        run(tmp_path)
    assert caught.value.code == 1
    lines = capsys.readouterr().err.splitlines()
    assert sum(line.startswith("b:") for line in lines) == 1
    made = {"a.nii.gz", "c.nii.gz", "identity.json", "inputs.jsonl"}
    assert {f.name for f in (tmp_path / "out").iterdir()} == made


def test_a_bug_in_one_case_does_not_lose_the_others(tmp_path, segmenter, monkeypatch, capsys):
    one = segmenter()
    right = one.predict_nifti

    def wrong(paths, **options):
        if paths[0].name.startswith("a"):
            raise ZeroDivisionError("by zero")
        return right(paths, **options)

    monkeypatch.setattr(one, "predict_nifti", wrong)
    write_scan(tmp_path / "in" / "a.nii.gz")
    write_scan(tmp_path / "in" / "b.nii.gz")
    with pytest.raises(UserError, match="1 of 2"):
        run(tmp_path)
    assert "a: internal error ZeroDivisionError: by zero" in capsys.readouterr().err
    assert (tmp_path / "out" / "b.nii.gz").is_file()
    (tmp_path / "out" / "b.nii.gz").unlink()
    with pytest.raises(ZeroDivisionError):
        run(tmp_path, "--debug")


def test_several_channels_are_named_as_nnunet_does(tmp_path, segmenter, capsys):
    one = segmenter(channels_in=2, modalities=("CT", "CT"))
    for name in ("a_0000", "a_0001", "lone_0000"):
        write_scan(tmp_path / "in" / f"{name}.nii.gz")
    with pytest.raises(UserError, match="1 of 2"):
        run(tmp_path)
    told = "lone: its files are lone_0000.nii.gz; the segmenter takes CASE_0000 (CT), CASE_0001 (CT)"
    assert told in capsys.readouterr().err
    assert (tmp_path / "out" / "a.nii.gz").is_file()
    assert one.segmenter.seen[0][0][1] == 2
    assert list(find_cases(tmp_path / "in" / "a_0000.nii.gz", channels=2)) == ["a"]
    assert len(find_cases(tmp_path / "in" / "a_0000.nii.gz", channels=2)["a"]) == 2


def test_wrong_input_is_one_clear_line(tmp_path, segmenter):
    with pytest.raises(UserError, match="no file or folder"):
        run(tmp_path)
    (tmp_path / "in").mkdir()
    with pytest.raises(UserError, match="no NIfTI file"):
        run(tmp_path)
    write_scan(tmp_path / "in" / "a.nii.gz")
    with pytest.raises(ConfigError, match="folder of the input"):
        main(["s", str(tmp_path / "in"), str(tmp_path / "in")])
    with pytest.raises(ConfigError, match="is a file"):
        main(["s", str(tmp_path / "in"), str(tmp_path / "in" / "a.nii.gz")])
    write_scan(tmp_path / "in" / "a_0000.nii.gz")
    with pytest.raises(UserError, match=r"would become case 'a': a.nii.gz, a_0000.nii.gz"):
        run(tmp_path)
    (tmp_path / "in" / "a_0002.nii.gz").write_bytes(b"")
    cases = find_cases(tmp_path / "in", channels=2)
    assert sorted(cases) == ["a", "a.nii.gz"], "a file without a number is no channel of a case"
    for case in cases:
        with pytest.raises(UserError, match=r"its files are .*takes CASE_0000 \(CT\), CASE_0001 \(PT\)"):
            check_channels(cases[case], ("CT", "PT"))
    with pytest.raises(UserError, match="CASE_0000"):
        find_cases(tmp_path / "in" / "a.nii.gz", channels=2)


def test_a_real_segmenter_file(tmp_path):
    from medseg_ssl.config import find
    from medseg_ssl.nets import encoder_file
    from medseg_ssl.nets.decoders.base import Decoder
    from medseg_ssl.nets.encoders.base import Encoder
    from medseg_ssl.nets.segmenter import Segmenter

    torch.manual_seed(0)
    resenc = find("medseg_ssl.nets.encoders", "resenc", Encoder)
    unet = find("medseg_ssl.nets.decoders", "unet", Decoder)
    encoder = resenc(resenc.Config(features=(4, 8, 8), blocks=(1, 1, 1)), 1)
    decoder = unet(unet.Config(), encoder.channels, encoder.strides)
    one = Segmenter(encoder, decoder, 3, supervised_levels=2)
    made = encoder_file.Card(
        kind="segmenter",
        encoder={},
        classes=("background", "a", "b"),
        crop_size=(16, 16, 16),
        spacing_mm=(2.0, 1.0, 1.0),
        intensity={"CT": CT_POLICY},
        modalities=("CT",),
    )
    file = encoder_file.save(
        tmp_path / "s.safetensors", encoder=encoder, decoder=decoder, head=one.heads, card=made
    )
    write_scan(tmp_path / "in" / "a.nii.gz", shape=(17, 33, 20))
    out = main([str(file), str(tmp_path / "in"), str(tmp_path / "out")])
    label = read_label(out / "a.nii.gz")
    assert label.array.shape == (17, 33, 20)
    assert label.array.max() <= 2
    encoder_file.save(
        tmp_path / "e.safetensors", encoder=encoder, card=made.model_copy(update={"kind": "encoder"})
    )
    with pytest.raises(UserError, match="holds an encoder, no segmenter"):
        main([str(tmp_path / "e.safetensors"), str(tmp_path / "in"), str(tmp_path / "other")])
