"""``probe``: named evaluations of a frozen encoder into scores.csv, and all config errors at once."""

import csv
import importlib
import json
import re

import numpy as np
import pytest

from medseg_ssl.config import ConfigError, UserError
from medseg_ssl.inference.frozen import FrozenEncoder
from pretrain.probe import SCORE_COLUMNS, main
from tests.evaluations.fakes import MemoryArchive, PooledEncoder, card

CONFIG = """
evaluations:
  health: {crops: 8, crop_size: [8, 8, 8]}
  retrieval: {modalities: [CT, MR], crop_size: [8, 8, 8], draws: 2}
"""


@pytest.fixture
def world(tmp_path, monkeypatch):
    archive = MemoryArchive(classes=())
    rng = np.random.default_rng(0)
    for i in range(4):
        for modality, unit in (("CT", "HU"), ("MR", "raw")):
            volume = rng.uniform(20, 90, (12, 12, 12)).astype(np.float32)
            archive.add_scan(f"{modality}{i}", volume, subject=f"p{i}", modality=modality, unit=unit)
    archive.set_split(test=("p0", "p1", "p2"), train=("p3",))
    monkeypatch.setattr("medseg_ssl.data.archive.Archive.open", lambda path: archive)
    monkeypatch.setattr(
        "medseg_ssl.inference.frozen.FrozenEncoder.load",
        lambda path, **options: FrozenEncoder(PooledEncoder(), card(kind="encoder")),
    )
    (tmp_path / "encoder.safetensors").write_bytes(b"weights")
    (tmp_path / "probe.yaml").write_text(CONFIG)
    return tmp_path


def run(folder, *more):
    encoder = str(folder / "encoder.safetensors")
    return main(
        [encoder, str(folder / "out"), "--archive", "a", "--config", str(folder / "probe.yaml"), *more]
    )


def test_scores_summary_and_tables(world):
    out = run(world)
    with (out / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == SCORE_COLUMNS
    names = {(r["evaluation"], r["name"]) for r in rows}
    assert {("health", "effective_rank/all"), ("retrieval", "top1/CT-MR"), ("retrieval", "chance")} <= names
    summary = json.loads((out / "summary.json").read_text())
    assert summary["scores"]["retrieval"]["chance"] == pytest.approx(1 / 3)
    with (out / "tables" / "retrieval.csv").open(newline="") as file:
        assert {r["subject"] for r in csv.DictReader(file)} == {"p0", "p1", "p2"}
    assert "health:" in (out / "config.yaml").read_text()
    assert all(str(world) not in f.read_text() for f in out.rglob("*") if f.is_file())


def test_second_run_and_another_config(world, capsys):
    out = run(world)
    assert run(world) == out
    assert "already holds" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="differ in config"):
        run(world, "evaluations.retrieval.draws=3")


def test_health_alone_without_a_config(world):
    out = main([str(world / "encoder.safetensors"), str(world / "out"), "--archive", "a"])
    assert set(json.loads((out / "summary.json").read_text())["scores"]) == {"health"}


def test_pictures_and_the_page(world):
    pictures = "evaluations={feature_pca: {scans: 2, subset: test, crop_size: [8, 8, 8]}, health: {crops: 4}}"
    out = run(world, pictures, "evaluations.health.crop_size=[8,8,8]")
    names = sorted(p.name for p in (out / "pictures").iterdir())
    assert names == ["feature_pca-CT-CT0.png", "feature_pca-MR-MR0.png"]
    page = (out / "report.html").read_text()
    assert page.count("<img ") == 2
    assert "effective_rank/all" in page
    assert len(sources := re.findall(r'(?:src|href)\s*=\s*["\']([^"\']*)', page)) >= 2
    assert all(source.startswith(("data:", "#")) for source in sources), "nothing is fetched"
    assert not re.search(r"url\(|@import|<link|<iframe", page)


def test_every_wrong_key_at_once(world):
    with pytest.raises(ConfigError) as caught:
        run(world, "evaluations.retrieval.drawz=3", "evaluations.helth.crops=3")
    assert "drawz" in str(caught.value)
    assert "no evaluation named 'helth' (did you mean 'health'?)" in str(caught.value)
    assert not (world / "out").exists()
    with pytest.raises(ConfigError, match="evaluate"):
        run(world, "evaluations={segmentation: {}}")


def test_what_cannot_run_is_said_before_a_folder_is_made(world):
    with pytest.raises(ConfigError) as caught:
        run(world, "evaluations={calibration: {}, linear: {}, health: {crops: 4}}")
    assert str(caught.value) == (
        "evaluations.calibration looks at a segmenter, which 'medseg-ssl evaluate' scores; probe has an encoder; "
        "evaluations.linear reads labels, and the archive has none"
    )
    assert not (world / "out").exists()
    told = (
        r"^health: no scan in subset 'development'.*; retrieval: retrieval needs 2 .* smaller than crop_size"
    )
    with pytest.raises(UserError, match=told):
        run(world, "evaluations.retrieval.crop_size=[99, 8, 8]", "evaluations.health.subset=development")
    assert not (world / "out").exists(), "nothing was found, so the folder is free for the mended config"


PARTS = (
    "evaluations={health: {crops: 4, crop_size: [8, 8, 8]}, feature_pca: {scans: 1, crop_size: [8, 8, 8]},"
)


PICTURES = "evaluations.feature_pca={scans: 1, subset: test, crop_size: [8, 8, 8]}"


def test_one_evaluation_that_fails_loses_none_of_the_others(world, capsys):
    wrong = [f"{PARTS} geometry: {{subset: development}}}}", "evaluations.feature_pca.subset=test"]
    with pytest.raises(
        UserError, match=r"^geometry: no scan in subset 'development'.*; what the other 3 found is kept$"
    ):
        run(world, *wrong)
    out = world / "out"
    with (out / "scores.csv").open(newline="") as file:
        assert {row["evaluation"] for row in csv.DictReader(file)} == {"health", "retrieval", "feature_pca"}
    assert (out / "report.html").read_text().count("<img ") == 1
    assert not (out / "summary.json").exists(), "not all is there"


def test_a_command_that_was_stopped_goes_on_with_what_is_missing(world, monkeypatch):
    out = run(world, PICTURES)
    whole = {f.relative_to(out): f.read_bytes() for f in out.rglob("*") if f.is_file()}
    (out / "evaluations" / "retrieval.json").unlink()
    for name in ("summary.json", "scores.csv", "report.html"):
        (out / name).unlink()
    for name in ("health.Health", "feature_pca.FeaturePCA"):
        monkeypatch.setattr(f"medseg_ssl.evaluations.{name}.run", lambda *_: pytest.fail("made again"))
    run(world, PICTURES)
    assert {f.relative_to(out): f.read_bytes() for f in out.rglob("*") if f.is_file()} == whole


def test_shipped_config_parses():
    from medseg_ssl.commandline import configs_folder
    from medseg_ssl.config import parse, read_yaml
    from pretrain.probe import ProbeConfig

    files = sorted((configs_folder() / "probe").glob("*.yaml"))
    assert files
    for file in files:
        assert parse(ProbeConfig, read_yaml(file), where=file.name).build()


def test_an_imported_encoder_sees_scans_by_the_archives_intensities(world, monkeypatch, capsys):
    """Its card states none; the same encoder with the archive's on its card scores the same."""
    own = card(kind="encoder")
    imported = own.model_copy(update={"intensity": {}})
    archive = importlib.import_module("medseg_ssl.data.archive").Archive.open("a")
    archive.intensity = own.intensity
    first = json.loads((run(world) / "summary.json").read_text())["scores"]
    monkeypatch.setattr(
        "medseg_ssl.inference.frozen.FrozenEncoder.load",
        lambda path, **options: FrozenEncoder(PooledEncoder(), imported),
    )
    (world / "out").rename(world / "before")
    assert json.loads((run(world) / "summary.json").read_text())["scores"] == first
    assert "states no intensities" in capsys.readouterr().out
