"""Comparisons and matrices in Weights & Biases: curves as tables and charts, encoders and budgets as artifacts.

Scores, means and weights go there; pictures of scans stay in the local report.
"""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from medseg_ssl.analysis.figures import curve_figure, heat_map
from medseg_ssl.analysis.label_efficiency import CURVE_COLUMNS
from medseg_ssl.analysis.tables import write_json
from medseg_ssl.analysis.transfer import MATRIX_COLUMNS
from medseg_ssl.analysis.transfer_page import gain_cells
from medseg_ssl.config import ConfigError, UserError

if TYPE_CHECKING:
    from medseg_ssl.analysis.report import Comparison
    from medseg_ssl.train.settings import WandbConfig

    from .transfer_tables import Found

logger = logging.getLogger(__name__)

ENCODER, BUDGETS = "encoder.safetensors", "budgets.json"
MARK = "mirror.json"
"""Says under which id a comparison or a matrix goes to the mirror, and whether it is there."""
DIFFERENCES = (
    "init", "baseline", "scope", "mean", "low", "high", "p", "p_holm", "wilcoxon_p", "wilcoxon_p_holm", "cases",
    "draws", "pretrainings", "covers",
)  # fmt: skip
SAVINGS = ("init", "baseline", "budget", "labels", "savings", "ci_low", "ci_high", "censored", "at_most")
GAINS = (
    "source",
    "target",
    "kind",
    "baseline",
    "mean",
    "low",
    "high",
    "p",
    "p_holm",
    "cases",
    "draws",
    "pretrainings",
)


DIRECT = ("controls", "asymmetry", "mixed", "beside")
"""Differences of a transfer's summary that are no gain of a cell; a table each."""


def group_in(out: Path) -> str | None:
    """Name of the group that the runs of a comparison form, the same whenever it goes on; None outside of one."""
    try:
        inputs = (out / "inputs.json").read_bytes()
        config = (out / "config.yaml").read_bytes()
        task = (yaml.safe_load(config) or {}).get("task")
    except OSError:
        return None
    return f"{task or 'runs'}-{hashlib.sha256(inputs + config).hexdigest()[:8]}"


def sent(out: Path) -> bool:
    """Whether a comparison is in the mirror; one without a mark was sent if an earlier version left a run of it.

    Raises:
        UserError: the mark cannot be read.
    """
    mark = _mark(out)
    return bool(mark["sent"]) if mark else any(out.glob("wandb/*run-*-*"))


def send_once(
    out: Path,
    found: Comparison,
    *,
    wandb: WandbConfig,
    config: Mapping[str, Any],
    encoders: Mapping[str, Path],
) -> None:
    """``send_comparison`` where it was not sent yet; one that was cut off is sent again, as the same run.

    Raises:
        UserError: the mark cannot be read or written.
    """
    what = {"wandb": wandb, "config": config, "encoders": encoders}
    _once(out, wandb, lambda known_id: send_comparison(out, found, **what, known_id=known_id))


def send_matrix_once(out: Path, found: Found, *, wandb: WandbConfig, config: Mapping[str, Any]) -> None:
    """``send_matrix`` where it was not sent yet.

    Raises:
        UserError: the mark cannot be read or written.
    """
    _once(out, wandb, lambda known_id: send_matrix(out, found, wandb=wandb, config=config, known_id=known_id))


def _once(out: Path, wandb: WandbConfig, send: Callable[[str | None], None]) -> None:
    """Where the mirror is disabled nothing is marked: the tables are written each time, a later call sends them."""
    from medseg_ssl.train.recorder import mirror_mode

    if mirror_mode(wandb) == "disabled":
        send(None)
    elif not sent(out):
        known = (_mark(out) or {"id": secrets.token_hex(4)})["id"]
        write_json(out / MARK, {"id": known, "sent": False})
        for half in out.glob(f"wandb/offline-run-*-{known}"):
            shutil.rmtree(half)
        send(known)
        write_json(out / MARK, {"id": known, "sent": True})


def send_left(out: Path, found: Comparison, *, encoders: Mapping[str, Path]) -> None:
    """Send a finished comparison that was killed after its tables were written and before the mirror got them.

    Args:
        out: its folder.
        found: what its fits say.
        encoders: files that came from elsewhere, by init.

    Raises:
        ConfigError: an encoder file that is none of its inits', or another one than it was made with.
        UserError: the folder is damaged.
    """
    from medseg_ssl.train.recorder import mirror_mode
    from medseg_ssl.train.run_folder import hash_file, locked

    if found.finished < found.planned or sent(out):
        return
    tree, wandb = _written(out)
    try:
        used = json.loads((out / "inputs.json").read_text(encoding="utf-8")).get("encoders") or {}
    except (OSError, ValueError) as error:
        raise UserError(f"the folder {out} is damaged: {error}") from error
    if mirror_mode(wandb) == "disabled":
        return
    missing = [name for name in used if name not in encoders]
    if missing:
        logger.warning(
            "not in W&B yet: the encoder of %s goes with the curve; add --encoder %s=FILE, or run compare again",
            missing[0],
            missing[0],
        )
        return
    for name, path in encoders.items():
        if hash_file(path) != used.get(name):
            raise ConfigError(f"--encoder {name}={path.name} is no file that {out} was made with")
    with locked(out) as free:  # else a comparison is at work here, and sends it itself
        if free:
            send_once(out, found, wandb=wandb, config=tree, encoders=encoders)


def send_matrix_left(out: Path, found: Found) -> None:
    """Send a finished benchmark that was killed after its tables were written and before the mirror got them.

    Args:
        out: its folder.
        found: what its fits say.

    Raises:
        UserError: the folder is damaged.
    """
    from medseg_ssl.train.recorder import mirror_mode
    from medseg_ssl.train.run_folder import locked

    if sent(out):
        return
    tree, wandb = _written(out)
    if mirror_mode(wandb) == "disabled":
        return
    with locked(out) as free:
        if free:
            send_matrix_once(out, found, wandb=wandb, config=tree)


def _written(out: Path) -> tuple[dict[str, Any], WandbConfig]:
    """The config in a folder, and how it is mirrored."""
    from medseg_ssl.train.settings import WandbConfig

    try:
        tree = yaml.safe_load((out / "config.yaml").read_text(encoding="utf-8")) or {}
        return tree, WandbConfig.model_validate(tree.get("wandb") or {})
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"the folder {out} is damaged: {error}") from error


def _mark(out: Path) -> dict[str, Any]:
    try:
        return json.loads((out / MARK).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read {out / MARK}: {error}; delete it to send what the folder holds again"
        ) from error


def send_comparison(
    out: Path,
    found: Comparison,
    *,
    wandb: WandbConfig,
    config: Mapping[str, Any],
    encoders: Mapping[str, Path],
    known_id: str | None = None,
) -> None:
    """Write a finished comparison into the mirror; offline it waits in ``OUT/wandb`` for ``wandb sync``.

    Args:
        out: folder of the comparison.
        found: what its fits say.
        wandb: how to mirror.
        config: resolved, shown beside the curve; its ``task`` names what is sent.
        encoders: files that came from elsewhere, by init; those of its own pretrainings are found in the folder.
        known_id: of the run in the mirror; None draws one.
    """
    from medseg_ssl.train.recorder import Recorder

    task, curve = config["task"], found.curve
    baselines = found.summary.get("baselines", ())
    with Recorder(out, wandb=wandb, config=config, tags=("compare", task), group=group_in(out)) as recorder:
        recorder.load_state_dict({"wandb_id": known_id})
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
        of_inits = found.summary.get("inits", {}).values()
        saved = [s for about in of_inits for s in about.get("savings", ())]
        if saved:
            recorder.table("savings", SAVINGS, [[s[name] for name in SAVINGS] for s in saved])
        each = [
            s
            for about in of_inits
            for found_ in about.get("savings_by_baseline", {}).values()
            for s in found_
        ]
        if each:
            recorder.table("savings_by_baseline", SAVINGS, [[s[name] for name in SAVINGS] for s in each])
        lines = found.summary.get("verdicts", ())
        if lines:
            recorder.table("verdicts", ("verdict",), [[line] for line in lines])
        areas = {f"area/{init}": about["area"] for init, about in found.summary.get("inits", {}).items()}
        recorder.summary(areas)
        own = {f.parent.name: f for f in sorted(out.glob(f"pretrain/*/{ENCODER}"))}
        for label, file in {**own, **encoders}.items():
            init = label.replace("@", "-")  # names of artifacts hold no "@"
            recorder.artifact(f"{task}-{init}", "encoder", {ENCODER: file}, about={"init": init})
        if (out / BUDGETS).is_file():
            recorder.artifact(f"{task}-budgets", "budgets", {BUDGETS: out / BUDGETS})


def send_matrix(
    out: Path,
    found: Found,
    *,
    wandb: WandbConfig,
    config: Mapping[str, Any],
    known_id: str | None = None,
) -> None:
    """Write a finished transfer benchmark into the mirror: matrix, curves, verdicts, its encoders and budgets.

    It is in one group with its pretrainings. The comparison on a target is part of it and no run of its own. Encoder
    files that came from elsewhere stay where they are.

    Args:
        out: folder of the benchmark.
        found: what its fits say.
        wandb: how to mirror.
        config: resolved; its ``task`` names what is sent.
        known_id: of the run in the mirror; None draws one.
    """
    from medseg_ssl.train.recorder import Recorder

    task, page = config["task"], found.page
    with Recorder(out, wandb=wandb, config=config, tags=("transfer", task), group=group_in(out)) as recorder:
        recorder.load_state_dict({"wandb_id": known_id})
        for name, columns, rows in (
            ("matrix", MATRIX_COLUMNS, found.matrix),
            ("curve", CURVE_COLUMNS, found.curve),
            ("gains", GAINS, page.summary["cells"]),
        ):
            recorder.table(name, columns, [[row[c] for c in columns] for row in rows])
        for name in DIRECT:
            if items := page.summary.get(name):
                columns = list(items[0])
                recorder.table(name, columns, [[_plain(item[c]) for c in columns] for item in items])
        recorder.table("verdicts", ("verdict",), [[line] for line in page.summary["verdicts"]])
        shown = heat_map(gain_cells(page.summary), columns=page.sources, targets=page.targets, gain=True)
        recorder.chart("transfer_matrix", shown)
        for target in page.targets:
            rows = [row for row in found.curve if row["target"] == target]
            scratch = [init for init, role in page.roles[target].items() if role == "scratch"]
            if rows:
                drawn = curve_figure(rows, metric="dice", baselines=scratch, label="Dice")
                recorder.chart(f"label_efficiency/{target}", drawn)
        for file in sorted(out.glob(f"pretrain/*/{ENCODER}")):
            source = file.parent.name
            recorder.artifact(f"{task}-{source}", "encoder", {ENCODER: file}, about={"source": source})
        for file in sorted(out.glob(f"targets/*/{BUDGETS}")):
            recorder.artifact(f"{task}-{file.parent.name}-budgets", "budgets", {BUDGETS: file})


def _plain(value: Any) -> Any:
    """A cell of a table: names and numbers of a list joined."""
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
