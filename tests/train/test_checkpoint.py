import builtins
import errno
import os

import pytest
import torch

from medseg_ssl.config import UserError
from medseg_ssl.train import checkpoint as checkpoints
from medseg_ssl.train.checkpoint import Checkpoint, replace_file

STATE = {"step": 3, "objective": {"weight": torch.arange(200_000.0)}, "due": False, "wandb_id": None}


class FullDisk:
    """A file on a disk with room for so many bytes."""

    def __init__(self, stream, room):
        self.stream, self.room = stream, room

    def write(self, data):
        self.room -= len(memoryview(data).cast("B"))
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.stream.write(data)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stream.close()

    def __getattr__(self, name):
        return getattr(self.stream, name)


def test_round_trip(tmp_path):
    checkpoint = Checkpoint(tmp_path / "last.ckpt")
    assert checkpoint.load() is None
    checkpoint.save(STATE)
    state = checkpoint.load()
    assert state["step"] == 3
    assert torch.equal(state["objective"]["weight"], STATE["objective"]["weight"])
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("room", [0, 1000, 400_000])
def test_full_disk_keeps_the_old_checkpoint(tmp_path, monkeypatch, room):
    checkpoint = Checkpoint(tmp_path / "last.ckpt")
    checkpoint.save(STATE)
    opened = builtins.open
    monkeypatch.setattr(checkpoints, "open", lambda *a, **k: FullDisk(opened(*a, **k), room), raising=False)
    told = r"no space left on the disk for .*last\.ckpt; the one written before is intact"
    with pytest.raises(UserError, match=told) as caught:
        checkpoint.save({**STATE, "step": 4})
    assert caught.value.code == 1
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert checkpoint.load()["step"] == 3
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_device_that_is_really_full(tmp_path):
    (tmp_path / "last.ckpt.tmp").symlink_to("/dev/full")
    with pytest.raises(UserError, match="no space left"):
        Checkpoint(tmp_path / "last.ckpt").save(STATE)
    assert not (tmp_path / "last.ckpt.tmp").is_symlink()


def test_a_broken_checkpoint_is_one_line(tmp_path):
    path = tmp_path / "last.ckpt"
    Checkpoint(path).save(STATE)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(
        UserError, match=r"cannot read the checkpoint .*; remove it to start the run anew"
    ) as caught:
        Checkpoint(path).load()
    assert "\n" not in str(caught.value)


def test_code_in_a_checkpoint_is_never_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "evil"),))

    torch.save({"format": 1, "x": Evil()}, tmp_path / "last.ckpt")
    with pytest.raises(UserError):
        Checkpoint(tmp_path / "last.ckpt").load()
    assert not (tmp_path / "evil").exists()


def test_another_format_is_told(tmp_path):
    torch.save({"format": 99}, tmp_path / "last.ckpt")
    with pytest.raises(UserError, match="format 99, this version reads 1"):
        Checkpoint(tmp_path / "last.ckpt").load()


def test_other_processes_do_not_write(tmp_path):
    Checkpoint(tmp_path / "last.ckpt", writes=False).save(STATE)
    assert not list(tmp_path.iterdir())


def test_an_error_of_ours_is_not_called_a_full_disk(tmp_path):
    def write(stream):
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        replace_file(tmp_path / "x", write)
    assert not list(tmp_path.iterdir())
