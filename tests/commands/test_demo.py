"""The demo end to end, with a handful of steps: phantom, archives, five inits, matrix; and going on after that."""

import csv

import pytest

from finetune.demo import main
from medseg_ssl.commandline import find_config

SHORT = [
    "budgets=[1]",
    "low_budgets=[1]",
    "draws=2",
    "finetune.train.steps=2",
    *(f"inits.{name}.pretrain.train.steps=2" for name in ("mae", "simclr", "paired")),
    "wandb.mode=disabled",
]


SHORT_TRANSFER = """
base: {base}
draws: 1
pretrain: {{train: {{steps: "2 steps"}}}}
finetune: {{train: {{steps: "2 steps"}}}}
wandb: {{mode: disabled}}
"""


@pytest.mark.slow
def test_the_story_ends_in_a_report_of_every_init(tmp_path):
    out, transfer = tmp_path / "demo", tmp_path / "short.yaml"
    base = find_config("phantom", kind="transfer")
    transfer.write_text(SHORT_TRANSFER.format(base=base), encoding="utf-8")
    command = [str(out), "--subjects", "14", "--transfer", str(transfer), *SHORT]
    report = main(command)
    assert report == out / "comparison" / "report.html"
    page = report.read_text(encoding="utf-8")
    with open(out / "comparison" / "curve.csv", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert {row["init"] for row in rows} == {"scratch", "scratch_long", "mae", "simclr", "paired"}
    assert all(row["init"] in page for row in rows)
    assert (out / "comparison" / "curve.png").is_file()
    written = {path: path.stat().st_mtime_ns for path in (out / "comparison" / "fits").rglob("cases.csv")}
    assert len(written) == 10
    with open(out / "transfer" / "matrix.csv", encoding="utf-8") as stream:
        cells = {(row["source"], row["target"]) for row in csv.DictReader(stream)}
    assert {(source, target) for source in ("CT", "MR", "CT+MR") for target in ("CT", "MR")} <= cells
    assert main(command) == report
    assert written == {path: path.stat().st_mtime_ns for path in written}, "finished fits are not repeated"
