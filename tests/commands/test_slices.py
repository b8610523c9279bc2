"""2D and 2.5D from scans to a segmentation: crops of one slice, crops of a few, and scans that are a single slice."""

import numpy as np
import pytest
import yaml

from finetune.predict import main as predict
from finetune.run import main as finetune
from medseg_ssl.data.archive import Archive
from medseg_ssl.data.nifti import read_label, read_nifti
from medseg_ssl.inference.predictor import Predictor
from medseg_ssl.nets import encoder_file
from pretrain.prepare import main as prepare
from pretrain.run import main as pretrain
from tests.data.scans import affine, save
from tests.train.archives import write_archive

COMMON = ["data.batch_size=2", "train.steps=2", "train.accelerator=cpu", "wandb.mode=disabled", "--quiet"]
FLAT = ["encoder.strides=[[1,1,1],[1,2,2],[1,2,2]]"]
SMALL = ["encoder.features=[8,12,16]", "encoder.blocks=[1,1,1]"]


def run_both(archive, folder, size, *more):
    """Pretrain with crops of a size, fine-tune what comes out with the same, and give the segmenter."""
    words = [f"objective.size={size}", "--archive", str(archive), *SMALL, *more, *COMMON]
    encoder = pretrain(["mae", str(folder / "mae"), "objective.hiding.block=[1,8,8]", *words])
    taken = ["--encoder", str(encoder), "transfer.decoder=true"]
    return finetune(["segmentation", str(folder / "seg"), *taken, "evaluations={segmentation: {}}", *words])


def write_scans(folder, depth, subjects=4):
    """CT of thick slices with an organ whose place changes from slice to slice, and its label."""
    y, x = np.meshgrid(np.linspace(-1, 1, 32), np.linspace(-1, 1, 32), indexing="ij")
    for number in range(subjects):
        noise = np.random.default_rng(number).normal(0, 10, (depth, 32, 32))
        places = np.linspace(-0.3, 0.3, depth + number + 1)[number:][:depth]
        organ = np.stack([(y - p) ** 2 + (x + p) ** 2 < 0.2 for p in places])
        volume = np.where(organ, 150.0, np.where(y**2 + x**2 < 0.9, 20.0, -1000.0)) + noise
        save(folder / f"sub{number}_CT.nii.gz", volume.astype(np.float32), affine((5.0, 1.0, 1.0)))
        save(folder / f"sub{number}_organ.nii.gz", organ.astype(np.uint8), affine((5.0, 1.0, 1.0)))


def prepared(folder, depth):
    write_scans(folder / "raw", depth)
    source = {
        "name": "folder",
        "pattern": "{subject}_{modality}.nii.gz",
        "modalities": {"CT": {"modality": "CT"}},
        "label_pattern": "{subject}_organ.nii.gz",
        "classes": {1: "organ"},
    }
    config = folder / "prepare.yaml"
    config.write_text(yaml.safe_dump({"source": source, "split": {"test": 1, "development": 1}}))
    words = ["--config", str(config), "--root", str(folder / "raw"), "--out", str(folder / "archive")]
    return prepare([*words, "--workers", "1", "--quiet"])


@pytest.mark.parametrize(
    ("size", "more"), [pytest.param("[1,32,32]", (), marks=pytest.mark.slow), ("[3,32,32]", FLAT)]
)
def test_slices_of_volumes(tmp_path, size, more):
    archive = write_archive(tmp_path / "archive")
    shipped = run_both(archive.path, tmp_path, size, *more)
    label = Predictor.load(shipped).predict_case(archive, "case-s6")
    assert label.shape == archive.original_label("case-s6")[0].shape
    card = encoder_file.load_card(shipped)
    assert list(card.crop_size) == yaml.safe_load(size)
    assert "eval/segmentation/dice" in (tmp_path / "seg" / "metrics.jsonl").read_text()


@pytest.mark.parametrize("more", [(), FLAT], ids=["strides of 3D", "strides of 2D"])
def test_a_volume_is_predicted_as_its_slices_are(tmp_path, more):
    archive = prepared(tmp_path, depth=2)
    shipped = run_both(archive, tmp_path, "[1,32,32]", *more)
    one = Predictor.load(shipped)
    scan = tmp_path / "raw" / "sub0_CT.nii.gz"
    whole = read_nifti(scan).array
    found = one.predict_nifti([scan], probabilities=True).prediction
    assert found.label_DHW.shape == (2, 32, 32)
    for number in range(2):
        path = save(tmp_path / f"slice{number}.nii", whole[number : number + 1], affine((5.0, 1.0, 1.0)))
        alone = one.predict_nifti([path], probabilities=True).prediction.probabilities_KDHW
        np.testing.assert_allclose(alone[:, 0], found.probabilities_KDHW[:, number], atol=1e-5)
    assert not np.allclose(found.probabilities_KDHW[:, 0], found.probabilities_KDHW[:, 1], atol=1e-3)


def test_scans_of_a_single_slice(tmp_path):
    archive = Archive.open(prepared(tmp_path, depth=1))
    assert {row.shape for row in archive.scans.values()} == {(1, 32, 32)}
    assert all("single_slice" in row.quality for row in archive.scans.values())
    shipped = run_both(archive.path, tmp_path, "[1,32,32]")
    out = predict([str(shipped), str(tmp_path / "raw" / "sub0_CT.nii.gz"), str(tmp_path / "out")])
    assert read_label(out / "sub0_CT.nii.gz").array.shape == (1, 32, 32)
