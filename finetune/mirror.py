"""A comparison in Weights & Biases: its curve as tables and charts, its encoders and budgets as artifacts.

Scores, means and weights go there; pictures of scans stay in the local report.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from medseg_ssl.analysis.figures import curve_figure
from medseg_ssl.analysis.label_efficiency import CURVE_COLUMNS

if TYPE_CHECKING:
    from medseg_ssl.analysis.report import Comparison
    from medseg_ssl.train.settings import WandbConfig

ENCODER, BUDGETS = "encoder.safetensors", "budgets.json"
DIFFERENCES = ("init", "baseline", "scope", "mean", "low", "high", "p", "p_holm", "cases", "draws")


def group_in(out: Path) -> str | None:
    """Name of the group that the runs of a comparison form, the same whenever it goes on; None outside of one."""
    try:
        inputs = (out / "inputs.json").read_bytes()
        config = (out / "config.yaml").read_bytes()
        task = (yaml.safe_load(config) or {}).get("task")
    except OSError:
        return None
    return f"{task or 'runs'}-{hashlib.sha256(inputs + config).hexdigest()[:8]}"


def send_comparison(
    out: Path,
    found: Comparison,
    *,
    wandb: WandbConfig,
    config: Mapping[str, Any],
    encoders: Mapping[str, Path],
) -> None:
    """Write a finished comparison into the mirror; offline it waits in ``OUT/wandb`` for ``wandb sync``.

    Args:
        out: folder of the comparison.
        found: what its fits say.
        wandb: how to mirror.
        config: resolved, shown beside the curve; its ``task`` names what is sent.
        encoders: files that came from elsewhere, by init; those of its own pretrainings are found in the folder.
    """
    from medseg_ssl.train.recorder import Recorder

    task, curve = config["task"], found.curve
    baselines = found.summary.get("baselines", ())
    with Recorder(out, wandb=wandb, config=config, tags=("compare", task), group=group_in(out)) as recorder:
        recorder.table("curve", CURVE_COLUMNS, [[row[c] for c in CURVE_COLUMNS] for row in curve])
        dice = [row for row in curve if row["metric"] == "dice"]
        inits = list(dict.fromkeys(row["init"] for row in dice))
        lines = {init: [(r["budget"], r["mean"]) for r in dice if r["init"] == init] for init in inits}
        recorder.curve("label_efficiency", lines, x="labels", y="dice", title=f"Label efficiency: {task}")
        recorder.chart(
            "label_efficiency", curve_figure(curve, metric="dice", baselines=baselines, label="Dice")
        )
        compared = found.summary.get("comparisons", ())
        if compared:
            recorder.table("differences", DIFFERENCES, [[c[name] for name in DIFFERENCES] for c in compared])
        areas = {f"area/{init}": about["area"] for init, about in found.summary.get("inits", {}).items()}
        recorder.summary(areas)
        # names of artifacts hold no "@"
        own = {f.parent.name.replace("@", "-"): f for f in sorted(out.glob(f"pretrain/*/{ENCODER}"))}
        for init, file in {**own, **encoders}.items():
            recorder.artifact(f"{task}-{init}", "encoder", {ENCODER: file}, about={"init": init})
        if (out / BUDGETS).is_file():
            recorder.artifact(f"{task}-budgets", "budgets", {BUDGETS: out / BUDGETS})
