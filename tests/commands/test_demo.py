"""The demo end to end, with a handful of steps: phantom, archive, five inits, report; and going on after that."""

import csv

import pytest

from finetune.demo import main

SHORT = [
    "budgets=[1]",
    "low_budgets=[1]",
    "draws=2",
    "finetune.train.steps=2",
    *(f"inits.{name}.pretrain.train.steps=2" for name in ("mae", "simclr", "paired")),
    "wandb.mode=disabled",
]


@pytest.mark.slow
def test_the_story_ends_in_a_report_of_every_init(tmp_path):
    out = tmp_path / "demo"
    report = main([str(out), "--subjects", "14", *SHORT])
    assert report == out / "comparison" / "report.html"
    page = report.read_text(encoding="utf-8")
    with open(out / "comparison" / "curve.csv", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert {row["init"] for row in rows} == {"scratch", "scratch_long", "mae", "simclr", "paired"}
    assert all(row["init"] in page for row in rows)
    assert (out / "comparison" / "curve.png").read_bytes().startswith(b"\x89PNG")
    written = {path: path.stat().st_mtime_ns for path in (out / "comparison" / "fits").rglob("cases.csv")}
    assert len(written) == 10
    assert main([str(out), "--subjects", "14", *SHORT]) == report
    assert written == {path: path.stat().st_mtime_ns for path in written}, "finished fits are not repeated"
