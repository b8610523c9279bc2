import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from medseg_ssl.cli import main as cli
from medseg_ssl.config import ConfigError, UserError, parse, read_yaml, shelf
from medseg_ssl.data import download
from medseg_ssl.data.archive import Archive
from medseg_ssl.data.prepare import PrepareConfig
from medseg_ssl.data.sources.base import Source
from pretrain import inspect as inspect_command
from pretrain import prepare as command
from tests.data.scans import folder_tree, msd_task

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs" / "prepare").glob("*.yaml"))


def arguments(tmp_path, *more):
    return ["--root", str(tmp_path / "raw"), "--out", str(tmp_path / "out"), "--workers", "1", *more]


def test_source_and_overrides_without_a_yaml(tmp_path, capsys):
    msd_task(tmp_path / "raw", 4)
    path = command.main(arguments(tmp_path, "--source", "msd", "spacing_mm=[2,2,2]", "split.test=1"))
    archive = Archive.open(path)
    assert {row.spacing_mm for row in archive.scans.values()} == {(2.0, 2.0, 2.0)}
    out = capsys.readouterr()
    assert "4 scans of 4 subjects" in out.err
    assert out.out == ""


def test_a_pattern_is_enough_for_names_that_tell(tmp_path):
    folder_tree(tmp_path / "raw", 3, labels=False)
    words = arguments(tmp_path, "--source", "folder", "--pattern", "{subject}_{modality}.nii.gz", "--quiet")
    archive = Archive.open(command.main(words))
    assert archive.facts().modalities == ("CT", "MR")


def test_several_roots(tmp_path):
    msd_task(tmp_path / "raw", 3)
    other = folder_tree(tmp_path / "other")
    words = [
        "--source",
        "folder",
        "--root",
        str(other),
        "--pattern",
        "{subject}_{modality}.nii.gz",
        "--quiet",
    ]
    with pytest.raises(UserError, match="no scan below"):
        command.main(arguments(tmp_path, *words))
    words = [*words[:2], "--root", str(folder_tree(tmp_path / "third", 5)), *words[2:]]
    archive = Archive.open(command.main([*words, "--out", str(tmp_path / "out"), "--workers", "1"]))
    # the same names in two roots are the same subjects on two days
    assert len({row.subject for row in archive.scans.values()}) == 5
    assert {pair.relation for pair in archive.pairs} == {"same_study", "same_subject"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "say where the scans come from"),
        (
            ["--source", "mds"],
            r"no source named 'mds' \(did you mean 'msd'\?\); known: .*folder, mixed, msd, nnunet",
        ),
        (["--source", "msd", "spacing=1"], "unknown key 'spacing'"),
        (["--source", "msd", "--workers", "0"], "--workers must be at least 1"),
        (["--source", "folder", "--download", "Task04_Hippocampus"], "fetches Decathlon tasks"),
        (["--source", "msd", "--download", "Task04_Hipocampus"], "did you mean 'Task04_Hippocampus'"),
    ],
)
def test_wrong_usage(tmp_path, words, message):
    msd_task(tmp_path / "raw", 3)
    with pytest.raises(ConfigError, match=message):
        command.main(arguments(tmp_path, *words))


def test_exit_codes_and_one_line(tmp_path, capsys):
    words = ["prepare", "--source", "msd", "--out", str(tmp_path / "out"), "--workers", "1"]
    assert cli([*words, "--root", str(tmp_path / "nothing")]) == 1
    assert cli([*words, "--root", str(tmp_path)]) == 1
    assert cli([*words, "--root", str(tmp_path), "order=7"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 3, lines
    assert all(line.startswith("error: ") for line in lines)
    msd_task(tmp_path / "raw", 3)
    assert cli([*words, "--root", str(tmp_path / "raw"), "--quiet"]) == 0


@pytest.mark.slow
def test_killed_and_run_again(tmp_path):
    """SIGKILL in the middle, and SIGTERM: what is finished stays, and the next run ends with the same archive."""
    msd_task(tmp_path / "raw", 24)
    words = [sys.executable, "-m", "pretrain.prepare", "--source", "msd", *arguments(tmp_path, "--quiet")]
    volumes = tmp_path / "out" / "volumes"
    for number, code in ((signal.SIGKILL, -9), (signal.SIGTERM, 143)):
        there = len(list(volumes.glob("*"))) if volumes.is_dir() else 0
        process = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        end = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < end:
            if volumes.is_dir() and len(list(volumes.glob("[0-9a-f]*.b2nd"))) > there + 3:
                process.send_signal(number)
                break
            time.sleep(0.002)
        _, text = process.communicate(timeout=60)
        assert process.returncode in (code, 0), text
        assert "Traceback" not in text
    done = command.main(["--source", "msd", *arguments(tmp_path, "--quiet")])
    reference = command.main(
        ["--source", "msd", *arguments(tmp_path, "--quiet", "--out", str(tmp_path / "again"))]
    )
    assert Archive.open(done).fingerprint == Archive.open(reference).fingerprint


def test_start_is_quick():
    code = (
        "import sys, pretrain.prepare, pretrain.inspect; "
        "heavy = {'torch', 'monai', 'timm', 'lightly', 'wandb', 'scipy', 'plotly', 'lightning', 'ray'}; "
        "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_shipped_configs(path):
    config = parse(PrepareConfig, read_yaml(path))
    assert config.source.name in shelf("medseg_ssl.data.sources")
    config.source.resolve("medseg_ssl.data.sources", Source)
    header = path.read_text().split("\n\n")[0]
    assert header.startswith("# ")
    assert f"medseg-ssl prepare --config configs/prepare/{path.name}" in header


@pytest.fixture
def server(monkeypatch):
    """The parts of monai.apps a download uses, without the seconds that importing monai takes."""
    task = "Task04_Hippocampus"

    class Server(types.SimpleNamespace):
        def fetch(self, url, target, hash_val, hash_type, progress):
            assert (url, hash_val, hash_type) == ("somewhere", "0123", "md5")
            Path(target).touch()

        def unpack(self, archive, folder, hash_val, hash_type):
            msd_task(Path(folder) / task, 3)
            if self.broken:
                raise RuntimeError("md5 check of downloaded file failed")

    server = Server(broken=False)
    data_set = types.SimpleNamespace(resource={task: "somewhere"}, md5={task: "0123"})
    modules = {
        "monai": {},
        "monai.apps": {},
        "monai.apps.datasets": {"DecathlonDataset": data_set},
        "monai.apps.utils": {"download_url": server.fetch, "extractall": server.unpack},
    }
    for name, content in modules.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return server


def test_download_is_unpacked_whole_or_not_at_all(tmp_path, server):
    server.broken = True
    with pytest.raises(UserError, match=r"could not fetch Task04_Hippocampus .* md5 check"):
        download.download_task("Task04_Hippocampus", tmp_path)
    assert not (tmp_path / "Task04_Hippocampus").exists()
    server.broken = False
    words = ["--source", "msd", "--download", "Task04_Hippocampus", "--root", str(tmp_path)]
    path = command.main([*words, "--out", str(tmp_path / "out"), "--quiet", "--workers", "1"])
    assert len(Archive.open(path).scans) == 3


@pytest.mark.slow
def test_monai_still_offers_the_tasks():
    from monai.apps.datasets import DecathlonDataset

    assert set(download.TASKS) == set(DecathlonDataset.resource) == set(DecathlonDataset.md5)


def test_inspect_shows_every_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    raw = folder_tree(tmp_path / "raw", 4)
    (raw / "sub_3_MR_T1.nii.gz").write_bytes(b"broken")
    words = [
        *("--source", "folder", "--pattern", "{subject}_{modality}.nii.gz", "--quiet"),
        *(
            "source.label_pattern={subject}_GTV.nii.gz",
            "source.classes={1: GTV}",
            "source.relation=registered",
        ),
    ]
    words = [w.replace("={subject}", "='{subject}").replace("GTV.nii.gz", "GTV.nii.gz'") for w in words]
    path = command.main(arguments(tmp_path, *words))
    assert inspect_command.main([str(path)]) == path
    text = capsys.readouterr().out
    for title in ("scans", "geometry", "intensities", "labels", "pairs", "dropped"):
        assert title in text
    assert "registered" in text
    assert "1 GTV" in text


def test_inspect_shows_names_as_they_are(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    msd_task(tmp_path / "raw", 4, labels={"0": "background", "1": "[left] organ", "2": "tumour"})
    words = ("--source", "msd", "--root", str(tmp_path / "raw"), "--out", str(tmp_path / "[red]"), "--quiet")
    inspect_command.main([str(command.main([*words, "split.test=1", "split.development=1"]))])
    text = capsys.readouterr().out
    assert "1 [left] organ" in text
    assert "[red]: generation 1" in text


def test_inspect_of_something_else(tmp_path, capsys):
    assert cli(["inspect", str(tmp_path)]) == 1
    assert "is not an archive" in capsys.readouterr().err


def test_progress_goes_to_the_terminal_only(tmp_path, capsys):
    msd_task(tmp_path / "raw", 3)
    command.main(["--source", "msd", *arguments(tmp_path, "--quiet")])
    assert capsys.readouterr() == ("", "")
    assert os.listdir(tmp_path / "out" / "splits") == ["default.json"]
