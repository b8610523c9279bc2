import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from medseg_ssl.config import ConfigError, Record, UserError
from medseg_ssl.train.run_folder import RunFolder, describe_environment, differences, hash_names


class Config(Record):
    lr: float = 1.0
    size: tuple[int, int, int] = (1, 2, 3)


def enter(path, *, inputs=None, **config):
    return RunFolder(path, config=Config(**config), inputs=inputs or {"archive": "f"}, ships="x.safetensors")


def test_a_new_folder_holds_config_and_environment(tmp_path):
    with enter(tmp_path / "a" / "run") as folder:
        assert not folder.complete
    run = tmp_path / "a" / "run"
    assert yaml.safe_load((run / "config.yaml").read_text()) == {"lr": 1.0, "size": [1, 2, 3]}
    environment = json.loads((run / "environment.json").read_text())
    assert environment["packages"]["torch"]
    assert str(Path.home()) not in (run / "environment.json").read_text()


def test_same_config_enters_again_and_knows_when_complete(tmp_path):
    with enter(tmp_path):
        (tmp_path / "x.safetensors").touch()
    with enter(tmp_path) as folder:
        assert folder.complete


def test_a_key_that_is_new_since_the_config_was_written_was_at_its_default_then(tmp_path):
    with enter(tmp_path):
        (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "config.yaml").write_text("lr: 1.0\n")
    with enter(tmp_path):
        pass
    with pytest.raises(ConfigError, match=r"holds another run: size: \[1, 2, 3\] -> \[1, 2, 4\]; name"):
        enter(tmp_path, size=(1, 2, 4))
    (tmp_path / "config.yaml").write_text("lr: 1.0\nold: 3\n")
    with pytest.raises(ConfigError, match=r"old: 3 -> null"):
        enter(tmp_path)


def test_another_config_is_refused_key_by_key(tmp_path):
    with enter(tmp_path):
        (tmp_path / "metrics.jsonl").touch()
    before = (tmp_path / "config.yaml").read_bytes()
    told = r"lr: 1.0 -> 2.0; size: \[1, 2, 3\] -> \[1, 2, 4\]; archive: \"f\" -> \"g\""
    with pytest.raises(ConfigError, match=told) as caught:
        enter(tmp_path, lr=2.0, size=(1, 2, 4), inputs={"archive": "g"})
    assert caught.value.code == 2
    assert (tmp_path / "config.yaml").read_bytes() == before
    with enter(tmp_path):
        pass  # the lock of the refused one is gone


def test_a_run_that_never_began_may_be_mended(tmp_path):
    with enter(tmp_path):
        pass
    with enter(tmp_path, lr=2.0):
        pass
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["lr"] == 2.0


def test_what_was_computed_keeps_its_config(tmp_path):
    fit = tmp_path / "fits" / "mae" / "b1"
    with enter(tmp_path):
        fit.mkdir(parents=True)
        (fit / "config.yaml").touch()
        (tmp_path / "wandb").mkdir()
        (tmp_path / "wandb" / "run.wandb").touch()
    with enter(tmp_path, lr=3.0):
        (fit / "cases.csv").touch()
    with pytest.raises(ConfigError, match=r"lr: 3.0 -> 2.0"):
        enter(tmp_path, lr=2.0)


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ConfigError, match=r"no run folder \(no config.yaml beside thesis.tex\)"):
        enter(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(ConfigError, match="is a file"):
        enter(tmp_path / "thesis.tex")


def test_two_processes_cannot_share_a_folder(tmp_path):
    hold = (
        "import sys, time\n"
        "from tests.train.test_run_folder import enter\n"
        "from pathlib import Path\n"
        "folder = enter(Path(sys.argv[1])); sys.stdout.write('held\\n'); sys.stdout.flush(); time.sleep(60)"
    )
    root = Path(__file__).resolve().parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", hold, tmp_path], cwd=root, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another process is working on"):
            enter(tmp_path)
    finally:
        process.kill()
        process.wait()
    with enter(tmp_path):
        pass  # a killed process leaves no lock


def test_differences_name_added_and_removed_keys():
    assert differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "d": 3}}) == [
        "a.c: 2 -> null",
        "a.d: null -> 3",
    ]


def test_names_are_compared_without_being_shown():
    assert hash_names(["s1", "s2"]) != hash_names(["s1", "s3"])
    assert "s1" not in hash_names(["s1"])


def test_environment_names_no_path():
    assert "/" not in json.dumps(describe_environment("cpu")).replace("+", "")
