"""A comparison whose fits are fakes: quick, deterministic, and picklable by name for worker processes."""

from __future__ import annotations

import hashlib
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from finetune.comparison import CompareConfig
from finetune.fits import DONE, ERROR, SLICES, FitTask, PretrainTask
from medseg_ssl import draws
from medseg_ssl.analysis.label_efficiency import CASE_COLUMNS
from medseg_ssl.analysis.pictures import Slice, write_slices
from medseg_ssl.analysis.tables import write_csv, write_text
from medseg_ssl.config import UserError, parse
from medseg_ssl.data.manifest import Split

GAIN = {"scratch": 0.0, "scratch_long": -0.01, "mae": 0.08, "given": 0.0}
CLASSES = ("background", "organ <b>", "lesion")


def config(**changes) -> CompareConfig:
    tree = {
        "task": "fake",
        "budgets": [1, 2, 4],
        "draws": 3,
        "inits": {
            "scratch": "scratch",
            "scratch_long": "scratch_long",
            "mae": {"pretrain": {"name": "fake"}},
        },
        "finetune": {
            "encoder": {"name": "resenc", "size": "tiny"},
            "data": {"batch_size": 2},
            "train": {"steps": "20 steps", "accelerator": "cpu"},
        },
        "wandb": {"mode": "disabled"},
    }
    return parse(CompareConfig, {**tree, **changes})


def archive(*, train: int = 6, test: int = 5, hashes: dict[str, str] | None = None) -> SimpleNamespace:
    """Stands in for ``Archive``: two scans never share content, unless ``hashes`` says so."""
    subjects = [f"s{i}" for i in range(train + test)]
    cases = {
        f"c{s[1:]}": SimpleNamespace(
            case=f"c{s[1:]}", subject=s, scans=(f"v{s[1:]}",), labeled=True, known_classes=()
        )
        for s in subjects
    }
    scans = {
        f"v{s[1:]}": SimpleNamespace(
            key=f"v{s[1:]}",
            subject=s,
            modality="MR",
            unit="raw",
            content_hash=(hashes or {}).get(s, s),
            appearance="",
        )
        for s in subjects
    }
    split = Split(
        name="default", seed=0, train=tuple(subjects[:train]), development=(), test=tuple(subjects[train:])
    )
    made = SimpleNamespace(
        fingerprint="f" * 16,
        recipe=SimpleNamespace(near_duplicate=0.95),
        classes=CLASSES,
        cases=cases,
        scans=scans,
        split=lambda name="default": split,
        original_label=lambda case: (np.zeros((2, 3, 4), np.uint8), np.eye(4)),
    )
    made.limited = lambda access: made  # a case has one channel
    return made


def card(path: Path) -> dict:
    """Stands in for reading an encoder file's card."""
    return {
        "steps": 100,
        "modalities": ["MR"],
        "encoder": {"name": "resenc", "size": "tiny"},
        "objective": "mae",
        "archive_fingerprint": "f" * 16,
    }


def fake_pretrain(task: PretrainTask) -> Path:
    write_text(
        task.folder / "metrics.jsonl", '{"step": 1, "train/loss": 1.0}\n{"step": 2, "train/loss": 0.5}\n'
    )
    return write_text(task.folder / "encoder.safetensors", "weights")


def fake_fit(task: FitTask) -> Path:
    """Dice that grows with the budget and with the init's gain, with crossed effects of case and draw."""
    rows = []
    for case in task.test_cases:
        for number, name in enumerate(CLASSES[1:]):
            dice = 0.5 + 0.1 * np.log2(task.budget) + GAIN.get(task.init, 0.0) - 0.1 * number
            dice += (
                0.02 * effect(case)
                + 0.02 * effect(str(task.draw))
                + 0.01 * effect(f"{task.folder.parts[-3:]}{case}")
            )
            metrics = {"dice": dice, "iou": dice / 2, "nsd": None, "nsd_tolerance_mm": 2.0, "hd95_mm": 3.0}
            rows.append(
                {**task.columns(), "case": case, "class": name, **metrics, "precision": dice, "recall": dice}
            )
    task.folder.mkdir(parents=True, exist_ok=True)
    if task.pictures:
        write_slices(task.folder / SLICES, [fake_slice(case) for case in task.test_cases])
    done = write_csv(task.folder / DONE, rows, columns=CASE_COLUMNS)
    (task.folder / ERROR).unlink(missing_ok=True)
    return done


def slow_fit(task: FitTask) -> Path:
    time.sleep(0.15)
    return fake_fit(task)


def counting_fit(task: FitTask) -> Path:
    (task.folder.parents[3] / f"did-{task.init}-{task.budget}-{task.draw}-{os.getpid()}").touch()
    return fake_fit(task)


def failing_fit(task: FitTask) -> Path:
    if (task.init, task.budget, task.draw) == ("mae", 2, 1):
        write_text(task.folder / ERROR, "loss is not finite")  # as the real fit does
        raise UserError("loss is not finite")
    return fake_fit(task)


def fake_slice(case: str) -> Slice:
    y, x = np.mgrid[:24, :20]
    truth = ((y - 12) ** 2 + (x - 10) ** 2 < 36).astype(np.uint8)
    prediction = ((y - 12) ** 2 + (x - 12) ** 2 < 36).astype(np.uint8) * 2
    return Slice(case, (x * 10).astype(np.uint8), truth, prediction, (1.0, 1.5))


def effect(text: str) -> float:
    return draws.numpy_generator(
        0, int(hashlib.sha256(text.encode()).hexdigest()[:8], 16), "effect"
    ).standard_normal()


def use_fakes(patch) -> None:
    """Put the stand-ins in place with a function ``patch(target, name, value)``."""
    from finetune import compare
    from medseg_ssl.data.archive import Archive

    patch(Archive, "open", staticmethod(lambda path: archive()))
    patch(compare, "_card", card)


if __name__ == "__main__":
    from finetune import compare

    use_fakes(setattr)
    compare.compare(
        config(),
        Path(sys.argv[1]),
        archive=Path("archive"),
        workers=2,
        quiet=True,
        fit=slow_fit,
        pretrain=fake_pretrain,
    )
