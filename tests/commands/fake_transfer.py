"""A transfer benchmark whose pretrainings and fits are fakes; run as a module it works slowly, to be killed."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from finetune.fits import DONE, FitTask, PretrainTask
from finetune.matrix import MatrixConfig, resolve
from medseg_ssl.analysis.label_efficiency import CASE_COLUMNS
from medseg_ssl.analysis.tables import write_csv, write_text
from medseg_ssl.config import parse

from . import fake_comparison as fakes

ARCHIVES = {"organs": Path("ct"), "lesions": Path("mr")}
NETWORK = {"name": "resenc", "size": "tiny", "features": [4, 8]}
TREE = {
    "task": "fake",
    "archives": ["organs", "lesions"],
    "sources": {"CT": {"archives": {"organs": ["CT"]}}, "MR": {"archives": {"lesions": ["MR"]}}},
    "unions": "all",
    "pretrain": {
        "encoder": NETWORK,
        "objective": {"name": "mae"},
        "data": {"batch_size": 2},
        "train": {"steps": "100 steps"},
    },
    "finetune": {
        "encoder": NETWORK,
        "data": {"batch_size": 2},
        "train": {"steps": "20 steps", "accelerator": "cpu"},
    },
    "targets": {"organs": {"archive": "organs"}, "lesions": {"archive": "lesions", "modalities": ["MR"]}},
    "budgets": [1, 2],
    "draws": 2,
    "low_budgets": [1, 2],
    "estimate": False,
    "wandb": {"mode": "disabled"},
}
GAIN = {
    ("CT", "CT"): 0.05,
    ("CT", "MR"): 0.01,
    ("MR", "CT"): 0.03,
    ("MR", "MR"): 0.04,
    ("CT+MR", "CT"): 0.06,
    ("CT+MR", "MR"): 0.06,
}


def config(**changes) -> MatrixConfig:
    return resolve(parse(MatrixConfig, {**TREE, **changes}))


def archive(path: Path) -> SimpleNamespace:
    """Stands in for an archive of one modality, which its path names."""
    made = fakes.archive(hashes={f"s{i}": f"{path}{i}" for i in range(11)})
    for row in made.scans.values():
        row.modality = path.name.upper()
        row.scanner = f"maker {int(row.key[1:]) % 2}"
        row.source = ""
    made.path, made.fingerprint = path, path.name * 8
    made.recipe.spacing_mm = (3.0, 1.0, 2.0)
    made.original_grid = lambda case: ((6, 5, 4), np.eye(4))
    made.original_label = lambda case: (np.ones((6, 5, 4), np.uint8), np.eye(4))
    return made


def card(path: Path) -> SimpleNamespace:
    """Stands in for the card of the encoder that ``fake_pretrain`` wrote."""
    modalities = tuple(path.read_text(encoding="utf-8").split("+"))
    return SimpleNamespace(
        objective="mae",
        steps=100,
        chosen_by=None,
        spacing_mm=None,
        modalities=modalities,
        archive_fingerprint="",
        archives=(),
        encoder=NETWORK,
        channels_in=1,
    )


def fake_pretrain(task: PretrainTask) -> Path:
    return write_text(task.folder / "encoder.safetensors", task.init)


def fake_fit(task: FitTask) -> Path:
    """Dice with crossed effects of case and draw, and a gain of (source, target)."""
    rows = []
    for case in task.test_cases:
        dice = 0.5 + 0.1 * np.log2(task.budget) + GAIN.get((task.init, task.target), 0.0)
        dice += 0.02 * fakes.effect(case) + 0.02 * fakes.effect(str(task.draw))
        dice += 0.002 * fakes.effect(f"{task.folder.parts[-5:]}{case}")
        metrics = {"dice": dice, "iou": dice / 2, "nsd": None, "nsd_tolerance_mm": 2.0, "hd95_mm": 3.0}
        rows.append(
            {**task.columns(), "case": case, "class": "organ", **metrics, "precision": dice, "recall": dice}
        )
    return write_csv(task.folder / DONE, rows, columns=CASE_COLUMNS)


def slow_fit(task: FitTask) -> Path:
    time.sleep(0.1)
    return fake_fit(task)


def use_fakes(patch) -> None:
    """Put the stand-ins in place with a function ``patch(target, name, value)``."""
    from finetune import compare, transfer
    from medseg_ssl.data.archive import Archive

    patch(Archive, "open", staticmethod(archive))
    patch(compare, "_card", lambda path: vars(card(path)))
    patch(transfer, "load_card", card)


if __name__ == "__main__":
    from finetune import transfer

    use_fakes(setattr)
    transfer.transfer(
        config(),
        Path(sys.argv[1]),
        archives=ARCHIVES,
        workers=1,
        quiet=True,
        fit=slow_fit,
        pretrain=fake_pretrain,
    )
