import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from medseg_ssl import cli
from medseg_ssl.config import ConfigError, UserError, parse
from medseg_ssl.data.archive_writer import ArchiveWriter
from medseg_ssl.nets import encoder_file
from pretrain.run import SHELVES, PretrainConfig, main, run_pretrain
from tests.train.archives import quick_templates, write_archive

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "encoder.features=[4,8,8,8]",
    "objective.size=[16,16,16]",
    "data.batch_size=2",
    "train.steps=4",
    "train.log_every=2",
    "train.accelerator=cpu",
    "wandb.mode=disabled",
]


@pytest.fixture(scope="module", autouse=True)
def few_registration_steps():
    with pytest.MonkeyPatch.context() as patch:
        quick_templates(patch)
        yield


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return write_archive(tmp_path_factory.mktemp("pretrain") / "archive").path


def pretrain(archive, run, *more, config="mae"):
    return main([config, str(run), "--archive", str(archive), "--quiet", *SMALL, *more])


def test_a_run_folder_holds_all_it_should(archive, tmp_path):
    shipped = pretrain(archive, tmp_path / "run", "evaluations={health: {crop_size: [16, 16, 16], crops: 8}}")
    assert shipped == tmp_path / "run" / "encoder.safetensors"
    run = tmp_path / "run"
    names = {p.name for p in run.iterdir()}
    assert {
        "config.yaml",
        "environment.json",
        "inputs.json",
        "metrics.jsonl",
        "images",
        "last.ckpt",
        shipped.name,
    } <= names
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if "train/loss" in r] == [2, 4]
    assert any(key.startswith("eval/health/") for key in rows[-1])
    assert {p.name for p in (run / "images").iterdir()} >= {"target-0000004.png", "restored-0000004.png"}

    card = encoder_file.load_card(shipped)
    assert (card.kind, card.objective, card.steps, card.crop_size) == ("encoder", "mae", 4, (16, 16, 16))
    assert card.decoder["name"] == "unet"
    assert set(card.intensity) == set(card.modalities) == {"CT", "MR"}
    assert encoder_file.build(shipped).decoder is not None

    for name in ("config.yaml", "environment.json", "inputs.json", "metrics.jsonl"):
        assert str(tmp_path) not in (run / name).read_text()


def test_the_resolved_config_is_a_config(archive, tmp_path):
    pretrain(archive, tmp_path / "a")
    written = tmp_path / "a" / "config.yaml"
    tree = yaml.safe_load(written.read_text())
    assert tree["objective"]["hiding"]["ratio"] == [0.6, 0.75], "defaults are written out"
    main([str(written), str(tmp_path / "b"), "--archive", str(archive), "--quiet"])
    assert (tmp_path / "b" / "config.yaml").read_text() == written.read_text()
    a, b = (encoder_file.build(tmp_path / n / "encoder.safetensors").encoder.state_dict() for n in ("a", "b"))
    assert all(torch.equal(a[name], b[name]) for name in a), "the same config and seed give the same weights"


def test_a_complete_run_returns_at_once(archive, tmp_path):
    shipped = pretrain(archive, tmp_path)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.iterdir() if p.name != ".lock"}
    assert pretrain(archive, tmp_path) == shipped
    assert {p: p.stat().st_mtime_ns for p in tmp_path.iterdir() if p.name != ".lock"} == before


def test_another_config_or_archive_in_the_same_folder(archive, tmp_path, tmp_path_factory):
    pretrain(archive, tmp_path)
    with pytest.raises(ConfigError, match=r"holds another run: optim.lr: 0.001 -> 0.5; name a new folder"):
        pretrain(archive, tmp_path, "optim.lr=0.5")
    other = write_archive(tmp_path_factory.mktemp("other") / "archive", labels=False).path
    with pytest.raises(ConfigError, match=r'archive: "[0-9a-f]+" -> "[0-9a-f]+"'):
        pretrain(other, tmp_path)


def test_all_wrong_keys_at_once(archive, tmp_path):
    wrong = ["encoder.sise=tiny", "objective.hidings=3", "train.step=2", "evaluations={helth: {}}", "seed=-1"]
    with pytest.raises(ConfigError) as caught:
        pretrain(archive, tmp_path / "run", *wrong)
    message = str(caught.value)
    for part in (
        "'encoder.sise' (did you mean 'size'?)",
        "'objective.hidings' (did you mean 'hiding'?)",
        "seed: ",
    ):
        assert part in message
    assert "'train.step' (did you mean 'steps'?)" in message
    assert "no evaluation named 'helth' (did you mean 'health'?)" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (
            ["objective.size=[12,16,16]"],
            r"crop size \[12, 16, 16\] of view 'crop'.*\[8, 16, 16\] or \[16, 16, 16\]",
        ),
        (
            ["objective.size=[8,8,8]", "objective.hiding.block=[4,4,4]"],
            r"nearest sizes that do: \[16, 16, 16\]",
        ),
        (
            ["objective.size=[512,512,512]"],
            r"crop size \(512, 512, 512\) is more than 4 times the largest scan",
        ),
        (["data.batch_size=3", "train.accumulate=2"], "batch_size 3 does not divide"),
        (["train.accelerator=gpu"], "torch sees none"),
        (
            ["train.precision=bf16"],
            r"wrong gradients for maps 2 voxels deep, as view 'crop' has at stride \[8, 8, 8\]",
        ),
        (["optim.name=adamm"], "no optimizer named 'adamm'"),
        (
            ["objective={name: distillation, size: [16, 16, 16]}"],
            "'distillation' goes on from a segmenter.* take finetune with --continue-from",
        ),
    ],
)
def test_what_cannot_be_is_told_before_the_folder_is_made(archive, tmp_path, more, told):
    if "gpu" in more[0] and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(ConfigError, match=told):
        pretrain(archive, tmp_path / "run", *more)
    if "optim" not in more[0]:
        assert not (tmp_path / "run").exists()
    pretrain(archive, tmp_path / "run")  # nothing in the folder stands in the way


def test_no_archive(tmp_path):
    with pytest.raises(UserError):
        pretrain(tmp_path / "nowhere", tmp_path / "run")


def test_test_subjects_are_never_seen(archive, tmp_path, monkeypatch):
    from medseg_ssl.data.archive import Archive

    read = set()
    original = Archive.read

    def watched(self, key, start, size):
        read.add(key.split("-")[0])
        return original(self, key, start, size)

    monkeypatch.setattr(Archive, "read", watched)
    pretrain(archive, tmp_path, "train.steps=12")
    assert read
    assert not read & {"s4", "s5", "s6", "s7"}


def test_a_scan_without_data_does_not_stop_a_run(tmp_path):
    broken = write_archive(tmp_path / "archive", broken="s1-MR").path
    pretrain(broken, tmp_path / "run")


def test_every_shipped_config_parses_and_round_trips():
    from medseg_ssl.commandline import configs_folder
    from medseg_ssl.config import to_yaml
    from medseg_ssl.train.session import read_config

    files = sorted((configs_folder() / "pretrain").glob("*.yaml"))
    assert {"mae", "simclr", "paired", "mae_l"} <= {f.stem for f in files}
    for file in files:
        config = read_config(PretrainConfig, file, [], shelves=SHELVES)
        assert parse(PretrainConfig, yaml.safe_load(to_yaml(config))) == config


def test_in_code(archive, tmp_path):
    tree = {
        "encoder": {"name": "resenc", "size": "tiny", "features": [4, 8, 8, 8]},
        "objective": {"name": "mae", "size": [32, 16, 16]},
        "data": {"batch_size": 2, "splits": ["train", "development"]},
        "train": {"steps": 2, "precision": "bf16", "channels_last": True, "accelerator": "cpu"},
        "wandb": {"mode": "disabled"},
    }
    assert run_pretrain(parse(PretrainConfig, tree), tmp_path, archive=archive, quiet=True).is_file()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_signal_to_the_command_saves_and_leaves_in_seconds(archive, tmp_path, number, code, workers):
    words = [
        sys.executable,
        "-m",
        "medseg_ssl.cli",
        "pretrain",
        "mae",
        str(tmp_path / "run"),
        "--archive",
        str(archive),
    ]
    words += [*SMALL, "train.steps=100000", "train.log_every=1", f"data.workers={workers}"]
    process = subprocess.Popen(
        words,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not metrics.exists():
        time.sleep(0.05)
    time.sleep(1)
    began = time.monotonic()
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - began < 10
    assert process.returncode == code, errors
    assert errors.splitlines()[-1].startswith(f"stopped by {number.name} after step ")
    assert "Traceback" not in errors
    assert (tmp_path / "run" / "last.ckpt").is_file()


def test_cli_ends_with_the_code_of_the_error(archive, tmp_path, capsys):
    assert cli.main(["pretrain", "maee", str(tmp_path / "run"), "--archive", str(archive)]) == 2
    assert "did you mean 'mae'" in capsys.readouterr().err
    assert cli.main(["pretrain", "mae", str(tmp_path / "run")]) == 2
    assert "--archive" in capsys.readouterr().err


# -- templates -----------------------------------------------------------------------------------------------


def test_templates_are_made_of_training_subjects_alone(archive, tmp_path):
    import numpy as np

    from medseg_ssl.data.archive import Archive

    pretrain(archive, tmp_path / "run", config="template")
    opened = Archive.open(archive)
    train = set(opened.split("default").train)
    for modality in ("CT", "MR"):
        with np.load(tmp_path / "run" / f"template_{modality}.npz") as file:
            keys = set(file["keys"].tolist())
        assert keys == {
            k for k, row in opened.scans.items() if row.subject in train and row.modality == modality
        }


def test_a_run_that_has_begun_wants_its_own_template_back(archive, tmp_path):
    run = tmp_path / "run"
    pretrain(archive, run, "train.save_every=2", config="template")
    (run / "encoder.safetensors").unlink()
    (run / "template_CT.npz").write_bytes(b"")
    with pytest.raises(UserError, match=r"template_CT.npz is missing, damaged or of other scans"):
        pretrain(archive, run, "train.save_every=2", config="template")


def test_a_failure_after_the_template_does_not_burn_the_folder(archive, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(ConfigError, match="no optimizer named 'adamww'"):
        pretrain(archive, run, "optim.name=adamww", config="template")
    assert pretrain(archive, run, config="template").is_file()


def like(path, keep, *, scan):
    """The archive again, with one more development subject that repeats the voxels of ``scan`` of the first."""
    other = write_archive(path)
    rows = [r.model_copy(update={"content_hash": scan}) if r.key == keep else r for r in other.scans.values()]
    writer = ArchiveWriter.open(path, other.recipe, other.classes)
    others = [
        r.model_copy(update={"content_hash": f"other {r.key}"}) if r.content_hash == r.key else r
        for r in rows
    ]
    return writer.commit(others, other.cases.values(), other.pairs, splits=[other.split()])


def test_protected_scans_are_refused_and_the_card_tells_what_was_checked(archive, tmp_path):
    leaking = like(tmp_path / "leaking", "s4-CT", scan="s0-CT")
    with pytest.raises(
        ConfigError, match=r"1 scan\(s\) .*: scan s0-CT has the voxels of s4-CT; leave"
    ) as caught:
        pretrain(archive, tmp_path / "run", f"data.protect=[{leaking.path}]")
    assert caught.value.code == 2
    assert not (tmp_path / "run").exists()
    clean = like(tmp_path / "clean", "s0-CT", scan="s0-CT")  # which trains there as well
    shipped = pretrain(archive, tmp_path / "run", f"data.protect=[{clean.path}]")
    own, other = encoder_file.load_card(shipped).checked_against
    assert (own["sides"], own["scans"]) == (["test"], 4)
    assert (other["archive"], other["sides"], other["scans"]) == (
        clean.fingerprint,
        ["test", "development"],
        8,
    )
    # the run folder knows the archive by its fingerprint, never by its path
    for name in ("config.yaml", "environment.json", "inputs.json", "metrics.jsonl"):
        assert "clean" not in (tmp_path / "run" / name).read_text()
    with pytest.raises(ConfigError, match="protect"):
        pretrain(archive, tmp_path / "run")


def test_a_test_subject_under_another_name_is_not_pretrained_on(tmp_path):
    opened = write_archive(tmp_path / "archive")
    rows = [
        r.model_copy(update={"content_hash": "s7-MR"}) if r.key == "s1-MR" else r
        for r in opened.scans.values()
    ]
    writer = ArchiveWriter.open(opened.path, opened.recipe, opened.classes)
    writer.commit(rows, opened.cases.values(), opened.pairs, splits=[opened.split()])
    with pytest.raises(
        ConfigError, match="under test of its own split 'default': scan s1-MR has the voxels of s7-MR"
    ):
        pretrain(opened.path, tmp_path / "run")
