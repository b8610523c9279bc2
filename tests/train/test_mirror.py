"""What an offline run holds, read back from its own file."""

import getpass
import json
import socket

import pytest

from finetune.comparison_tables import read_comparison
from finetune.mirror import group_in, send_comparison, send_once
from finetune.mirror import sent as sent_already
from medseg_ssl.train.settings import WandbConfig
from tests.commands.fake_folder import write_folder

from .offline import history as history_of
from .offline import records


@pytest.fixture(scope="module")
def sent(tmp_path_factory):
    """A comparison's folder after it was sent, and the records of its run."""
    patch = pytest.MonkeyPatch()
    home = tmp_path_factory.mktemp("home")
    for name in ("WANDB_MODE", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        patch.delenv(name, raising=False)
    patch.setenv("HOME", str(home))
    out = write_folder(tmp_path_factory.mktemp("Doe_Jane") / "out", cases=3, budgets=(1, 2), volumes=False)
    (out / "pretrain" / "mae").mkdir(parents=True)
    (out / "pretrain" / "mae" / "encoder.safetensors").write_bytes(b"weights")
    given = tmp_path_factory.mktemp("Roe_Richard") / "secret-name.safetensors"
    given.write_bytes(b"other weights")
    (out / "budgets.json").write_text('{"0": {"1": ["a"]}}')
    found, _ = read_comparison(out)
    config = {"task": "balls", "budgets": [1, 2]}
    send_comparison(out, found, wandb=WandbConfig(), config=config, encoders={"given": given})
    yield out, found, records(out)
    patch.undo()


@pytest.mark.slow
def test_the_run_has_its_group_and_config(sent):
    out, _, found = sent
    (run,) = [r.run for r in found if r.WhichOneof("record_type") == "run"][:1]
    assert run.run_group == group_in(out)
    assert run.run_group.startswith("balls-")
    assert list(run.tags) == ["compare", "balls"]
    assert {u.key: json.loads(u.value_json) for u in run.config.update}["budgets"] == [1, 2]


@pytest.mark.slow
def test_the_curve_stands_in_the_offline_run(sent):
    out, found, recorded = sent
    history = history_of(recorded)
    keys = {
        "tables/curve",
        "tables/label_efficiency",
        "tables/differences",
        "tables/savings",
        "tables/verdicts",
    }
    keys |= {"charts/label_efficiency"}
    assert keys <= set(history)
    (files,) = (out / "wandb").glob("offline-run-*/files")
    table = json.loads((files / history["tables/curve"]["path"]).read_text())
    means = [row[table["columns"].index("mean")] for row in table["data"]]
    assert means == pytest.approx([row["mean"] for row in found.curve], nan_ok=True)
    chart = json.loads((files / history["charts/label_efficiency"]["path"]).read_text())
    assert {trace["name"] for trace in chart["data"]} == {"scratch", "scratch_long", "mae"}
    line = next(v for k, v in history.items() if k.startswith("curves/label_efficiency") and "path" in v)
    points = json.loads((files / line["path"]).read_text())
    assert len(points["data"]) == 3 * 2
    # a chart of the mirror's own needs its definition beside the table
    assert any(
        "label_efficiency" in str(r.config) for r in recorded if r.WhichOneof("record_type") == "config"
    )


@pytest.mark.slow
def test_encoders_and_budgets_are_artifacts(sent):
    _, _, recorded = sent
    artifacts = {r.artifact.name: r.artifact for r in recorded if r.WhichOneof("record_type") == "artifact"}
    assert {name: artifacts[name].type for name in ("balls-mae", "balls-given", "balls-budgets")} == {
        "balls-mae": "encoder",
        "balls-given": "encoder",
        "balls-budgets": "budgets",
    }
    assert [e.path for e in artifacts["balls-given"].manifest.contents] == ["encoder.safetensors"]
    assert [e.path for e in artifacts["balls-budgets"].manifest.contents] == ["budgets.json"]
    assert artifacts["balls-mae"].manifest.contents[0].size == len(b"weights")


@pytest.mark.slow
def test_no_path_and_no_name_goes_with_it(sent):
    out, _, recorded = sent
    content = b"".join(r.SerializeToString() for r in recorded)
    content += b"".join(p.read_bytes() for p in out.glob("wandb/offline-run-*/files/**/*") if p.is_file())
    # `wandb sync` reads files from these local places; the places themselves are not sent
    for local in ("wandb/artifacts/staging", "wandb/offline-run"):
        content = content.replace(str(out / local).encode(), b"")
    assert str(out).encode() not in content
    assert b"Roe_Richard" not in content
    assert b"secret-name" not in content
    for name in (socket.gethostname(), getpass.getuser()):
        assert len(name) < 6 or name.encode() not in content  # shorter ones occur by chance


@pytest.mark.slow
def test_a_send_that_was_cut_off_leaves_one_run_with_the_curve(tmp_path, monkeypatch):
    from medseg_ssl.train.recorder import Recorder

    for name in ("WANDB_MODE", "WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    out = write_folder(tmp_path / "out", cases=3, budgets=(1, 2), volumes=False)
    found, _ = read_comparison(out)
    what = {"wandb": WandbConfig(), "config": {"task": "balls"}, "encoders": {}}

    def dies(self, name, figure):
        raise ConnectionError("the power went out")

    monkeypatch.setattr(Recorder, "chart", dies)
    with pytest.raises(ConnectionError):
        send_once(out, found, **what)
    assert not sent_already(out)
    assert len(list(out.glob("wandb/offline-run-*"))) == 1
    monkeypatch.undo()
    for name in ("WANDB_MODE", "WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    for _ in range(2):
        send_once(out, found, **what)
    assert sent_already(out)
    (run,) = out.glob("wandb/offline-run-*")
    assert run.name.endswith(json.loads((out / "mirror.json").read_text())["id"])
    keys = [
        (item.nested_key or [item.key])[0]
        for record in records(out)
        if record.WhichOneof("record_type") == "history"
        for item in record.history.item
    ]
    assert "charts/label_efficiency" in keys


def test_a_group_belongs_to_one_comparison(tmp_path):
    assert group_in(tmp_path) is None
    names = []
    for name, inputs in (("a", "1"), ("b", "1"), ("c", "2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "inputs.json").write_text(inputs)
        (tmp_path / name / "config.yaml").write_text("task: balls\n")
        names.append(group_in(tmp_path / name))
    assert names[0] == names[1] != names[2]
