import json

import numpy as np
import pytest
import torch
from PIL import Image

from medseg_ssl.train.progress import Progress, clock
from medseg_ssl.train.recorder import Recorder, mid_slices, mirror_mode
from medseg_ssl.train.settings import WandbConfig

from .offline import records


def test_metrics_are_strict_json_lines(tmp_path):
    with Recorder(tmp_path) as recorder:
        recorder.log(10, {"train/loss": 0.5, "eval/x/y": float("nan")})
    (row,) = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert row.pop("time_s") >= 0
    assert row == {"step": 10, "train/loss": 0.5, "eval/x/y": None}


def test_going_on_cuts_off_what_came_after_the_checkpoint(tmp_path):
    lines = [json.dumps({"step": s}) for s in (5, 10, 15)] + ['{"step": 1']  # the last one half written
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    Recorder(tmp_path).load_state_dict({"step": 10})
    assert [json.loads(x)["step"] for x in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [5, 10]


def test_other_processes_write_nothing(tmp_path):
    with Recorder(tmp_path, writes=False, wandb=WandbConfig()) as recorder:
        recorder.load_state_dict({})
        recorder.log(1, {"a": 1.0})
        recorder.image("x", torch.zeros(1, 4, 4, 4), step=1)
        recorder.table("t", ["a"], [[1]])
        recorder.warn("w")
    assert not list(tmp_path.iterdir())


def test_middle_slices_in_three_planes_upright():
    volume = torch.zeros(1, 4, 6, 8)
    volume[0, 3] = 1.0  # the top (superior) slice
    sheet = mid_slices(volume)
    assert sheet.shape == (8, 30)
    coronal = sheet[:4, 10:18]
    assert coronal[0].max() == 255
    assert coronal[1:].max() == 0


def test_classes_are_coloured_and_channels_are_rows():
    assert mid_slices(torch.ones(2, 4, 4, 4, dtype=torch.int64)).shape == (12, 18, 3)
    assert mid_slices(torch.rand(2, 3, 4, 4, 4)).shape == (36, 18)


def test_pictures_land_in_the_run_folder(tmp_path):
    path = Recorder(tmp_path).image("in/put", torch.rand(2, 1, 8, 8, 8), step=7)
    assert path == tmp_path / "images" / "in_put-0000007.png"
    assert np.asarray(Image.open(path)).shape == (20, 30)


def test_curve_is_a_table_too(tmp_path):
    path = Recorder(tmp_path).curve("dice", {"mae": [(1, 0.5), (2, 0.6)]}, x="budget", y="dice")
    assert path.read_text().splitlines() == ["series,budget,dice", "mae,1,0.5", "mae,2,0.6"]


@pytest.mark.parametrize(
    ("mode", "key", "expected"),
    [
        ("offline", "k", "offline"),
        ("auto", "k", "offline"),
        ("online", "k", "offline"),
        ("disabled", "", "disabled"),
    ],
)
def test_a_test_never_goes_online(monkeypatch, mode, key, expected):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", key)
    assert mirror_mode(WandbConfig(mode=mode)) == expected


def test_mode_outside_of_tests(monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("PYTEST_CURRENT_TEST", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "k")
    assert mirror_mode(WandbConfig(mode="auto")) == "online"
    monkeypatch.delenv("WANDB_API_KEY")
    assert mirror_mode(WandbConfig(mode="auto")) == "offline"
    assert mirror_mode(WandbConfig()) == "offline"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert mirror_mode(WandbConfig(mode="online")) == "disabled"


@pytest.mark.slow
def test_the_offline_mirror_stays_in_the_run_folder_and_names_nobody(tmp_path, monkeypatch):
    import getpass
    import socket

    monkeypatch.delenv("WANDB_MODE", raising=False)
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    run = tmp_path / "run"
    run.mkdir()
    with Recorder(run, wandb=WandbConfig(), config={"seed": 0}) as recorder:
        recorder.load_state_dict({})
        recorder.log(1, {"train/loss": 1.0})
        recorder.image("x", torch.rand(1, 8, 8, 8), step=1)
        recorder.curve("dice", {"mae": [(1, 0.5), (2, 0.6)]}, x="budget", y="dice")
        first = recorder.state_dict()["wandb_id"]
    with Recorder(run, wandb=WandbConfig()) as recorder:
        recorder.load_state_dict({"step": 1, "wandb_id": first})
        assert recorder.state_dict()["wandb_id"] == first
    sent = records(run)
    assert any(r.WhichOneof("record_type") == "history" for r in sent)
    assert not [p for p in (tmp_path / "home").rglob("*") if p.is_file()]
    content = b"".join(r.SerializeToString() for r in sent)
    content += b"".join(p.read_bytes() for p in run.glob("wandb/offline-run-*/files/**/*") if p.is_file())
    # `wandb sync` reads a table's bytes from this local path; the path itself is not sent
    staging = str(run / "wandb" / "artifacts" / "staging").encode()
    assert str(tmp_path).encode() not in content.replace(staging, b"")
    for name in (socket.gethostname(), getpass.getuser()):
        assert len(name) < 6 or name.encode() not in content  # shorter ones occur by chance


def test_progress_without_a_terminal_is_a_line_at_the_end(capsys):
    with Progress("train") as progress:
        progress.note("loss 0.5")
        progress.advance(1, 10)
        progress.advance(5, 10)
        progress.advance(10, 10)
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("train 10/10 · loss 0.5")
    assert len(lines) <= 2


def test_quiet_is_quiet(capsys):
    with Progress("train", quiet=True) as progress:
        progress.advance(10, 10)
        progress.say("x")
    assert capsys.readouterr().err == ""


def test_clock():
    assert [clock(s) for s in (5, 65, 3661)] == ["0:05", "1:05", "1:01:01"]


def test_a_warning_is_said_once(tmp_path):
    recorder = Recorder(tmp_path)
    recorder.warn("rank is 1.20")
    recorder.warn("rank is 1.10")
    assert (tmp_path / "warnings.txt").read_text() == "rank is 1.20\n"
