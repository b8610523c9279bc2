"""A finished comparison folder of made-up cases: scores, slices, volumes and predictions, without any training."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from finetune.comparison_tables import PLAN
from finetune.fits import DONE, SLICES
from finetune.volumes import PREDICTIONS, VOLUMES
from medseg_ssl.analysis.label_efficiency import CASE_COLUMNS
from medseg_ssl.analysis.metrics import case_metrics
from medseg_ssl.analysis.pictures import Slice, write_slices
from medseg_ssl.analysis.tables import write_csv, write_json, write_text
from medseg_ssl.analysis.volumes import (
    CasePrediction,
    CaseVolume,
    box_around,
    grey_channel,
    volumes_ml,
    write_predictions,
    write_volume,
)

CLASSES = ("background", "anterior <b>", "posterior")
SHAPE, SPACING = (14, 22, 18), (2.0, 1.0, 1.5)
MARKER = 1000.0
"""Value of a bright ball at the patient's left, anterior and superior."""


def phantom(number: int, shape=SHAPE) -> tuple[np.ndarray, np.ndarray]:
    """An image in HU (D, H, W) and its label: two organs behind one another, and a bright marker that no label has."""
    generator = np.random.default_rng(number)
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    shift = generator.uniform(-0.15, 0.15, 3)
    near = (z - shift[0]) ** 2 + (y - shift[1] - 0.25) ** 2 + (x - shift[2]) ** 2 < 0.12
    far = (z - shift[0]) ** 2 + (y - shift[1] + 0.35) ** 2 + (x - shift[2]) ** 2 < 0.12
    label = np.where(near, 1, np.where(far, 2, 0)).astype(np.uint8)
    image = np.where(label > 0, 80.0, np.where(z**2 + y**2 + x**2 < 1.3, 20.0, -300.0)) + generator.normal(
        0, 15, shape
    )
    image[(z - 0.7) ** 2 + (y - 0.6) ** 2 + (x + 0.6) ** 2 < 0.03] = (
        MARKER  # W runs to the right: low x is left
    )
    return image, label


def prediction(label: np.ndarray, *, quality: float, number: int) -> np.ndarray:
    """The label, moved and partly lost: the better, the less."""
    generator = np.random.default_rng(number)
    steps = np.round(generator.normal(0, 3.5 * (1 - quality), 3)).astype(int)
    out = np.roll(label, tuple(int(s) for s in steps), axis=(0, 1, 2))
    if generator.uniform() > quality + 0.25:
        out = np.where(out == int(generator.integers(1, 3)), 0, out)
    return out.astype(np.uint8)


def write_folder(
    out: Path,
    *,
    inits: tuple[str, ...] = ("scratch", "scratch_long", "mae"),
    budgets: tuple[int, ...] = (1, 4),
    draws: int = 3,
    cases: int = 5,
    shape=SHAPE,
    volumes: bool = True,
) -> Path:
    """Write the folder and return it; the case with number 0 is the worst for every init."""
    names = [f"{7919 * (i + 1):016x}"[::-1] for i in range(cases)]
    images = [phantom(i, shape) for i in range(cases)]
    boxes = [box_around(label, SPACING, voxels=1_000_000) for _, label in images]
    for name, box, (image, label) in zip(names, boxes, images, strict=True):
        if volumes:
            channel = grey_channel("CT", "HU", box.cut(image), None, limits=(-1000.0, 1000.0))
            sizes = volumes_ml(label, SPACING, len(CLASSES))
            volume = CaseVolume(name, CLASSES, (channel,), box.cut(label), SPACING, box, sizes)
            write_volume(out / VOLUMES / f"{name}.npz", volume)
    fits = []
    for place, init in enumerate(inits):
        for budget in budgets:
            for draw in range(draws):
                folder = out / "fits" / init / f"b{budget}" / f"d{draw}"
                fits.append(folder.relative_to(out).as_posix())
                rows, slices, kept = [], [], {}
                for index, (name, box, (image, label)) in enumerate(zip(names, boxes, images, strict=True)):
                    quality = 0.6 + 0.06 * np.log2(budget) + 0.02 * place - (0.25 if index == 0 else 0.0)
                    seen = prediction(
                        label, quality=quality, number=hash((place, budget, draw, index)) % 2**31
                    )
                    fixed = {"task": "balls", "source": "", "target": "CT", "init": init, "budget": budget}
                    fixed |= {"draw": draw, "seed": 1000 * budget + draw, "case": name}
                    found = case_metrics(
                        seen, label, spacing_mm=SPACING, classes=CLASSES, nsd_tolerance_mm=2.0
                    )
                    rows += [{**fixed, **row} for row in found]
                    middle = int((label > 0).sum(axis=(1, 2)).argmax())
                    grey = np.clip((image[middle] + 300) / 4, 0, 255).astype(np.uint8)
                    slices.append(Slice(name, grey, label[middle], seen[middle], SPACING[1:]))
                    heat = np.abs(np.gradient(label.astype(float))[0]) * 255 if index < 2 else None
                    saliency = None if heat is None else box.cut(np.clip(heat, 0, 255).astype(np.uint8))
                    kept[name] = CasePrediction(box.cut(seen), box.outside(seen) * 0.003, saliency)
                if draw == 0:
                    folder.mkdir(parents=True)
                    write_slices(folder / SLICES, slices)
                    if volumes:
                        write_predictions(folder / PREDICTIONS, kept)
                write_csv(folder / DONE, rows, columns=CASE_COLUMNS)
    plan = {"task": "balls", "inits": list(inits), "baselines": [i for i in inits if i.startswith("scratch")]}
    plan |= {
        "low_budgets": list(budgets),
        "fits": fits,
        "notes": ["Made up."],
        "command": "medseg-ssl compare balls OUT",
    }
    write_json(out / PLAN, plan)
    write_text(out / "config.yaml", "task: balls\nseed: 3\n")
    write_text(out / "inputs.json", json.dumps({"archive": "f" * 16, "encoders": {"mae": "e" * 16}}))
    write_text(out / "environment.json", json.dumps({"medseg_ssl": "0.1.0", "packages": {"torch": "2.8.0"}}))
    return out
