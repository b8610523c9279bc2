"""Small scans on disk, for tests of sources and of prepare."""

import json
from pathlib import Path

import numpy as np

from medseg_ssl.data.nifti import original_grid, write_nifti

SHAPE = (10, 12, 14)


def affine(spacing=(1.0, 1.0, 1.0), origin=(0.0, 0.0, 0.0)):
    """(D, H, W) index to RAS mm of an axis-aligned grid."""
    out = np.zeros((4, 4))
    for axis in range(3):
        out[2 - axis, axis] = spacing[axis]
    out[:3, 3] = origin
    out[3, 3] = 1
    return out


def body(seed, shape=SHAPE):
    """A bright box with noise in dark noise; no voxel is exactly 0."""
    rng = np.random.default_rng(seed)
    volume = rng.normal(20, 5, shape).clip(1).astype(np.float32)
    volume[2:-2, 2:-2, 2:-2] += 100
    return np.round(volume)


def box_label(shape=SHAPE, value=1):
    label = np.zeros(shape, np.uint8)
    label[3:6, 4:8, 5:9] = value
    return label


def save(path: Path, array, grid=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    grid = affine() if grid is None else grid
    return write_nifti(path, array, original_grid(array.shape, grid), dtype=array.dtype)


def msd_task(root: Path, cases=4, *, labels=None, test=0):
    """A Decathlon task with one MR channel."""
    names = [f"case_{i:03d}" for i in range(cases)]
    for i, name in enumerate(names):
        save(root / "imagesTr" / f"{name}.nii.gz", body(i))
        save(root / "labelsTr" / f"{name}.nii.gz", box_label())
    held = [f"case_{i:03d}" for i in range(cases, cases + test)]
    for i, name in enumerate(held, cases):
        save(root / "imagesTs" / f"{name}.nii.gz", body(i))
    task = {
        "modality": {"0": "MRI"},
        "labels": labels or {"0": "background", "1": "organ", "2": "tumour"},
        "training": [{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in names],
        "test": [f"./imagesTs/{n}.nii.gz" for n in held],
    }
    (root / "dataset.json").write_text(json.dumps(task))
    return root


FOLDER = {
    "name": "folder",
    "pattern": "{subject}_{modality}.nii.gz",
    "modalities": {
        "CT": {"modality": "CT"},
        "PET": {"modality": "PT", "contrast": "FDG", "unit": "SUV"},
        "MR_T1": {"modality": "MR", "contrast": "T1w"},
    },
}


def folder_tree(root: Path, subjects=3, *, labels=True):
    """Registered CT and MR of several subjects, with one label for both."""
    for i in range(subjects):
        save(root / f"sub_{i}_CT.nii.gz", body(i) - 1000)
        save(root / f"sub_{i}_MR_T1.nii.gz", body(100 + i))
        if labels:
            save(root / f"sub_{i}_GTV.nii.gz", box_label())
    return root


LABELED_FOLDER = {
    **FOLDER,
    "label_pattern": "{subject}_GTV.nii.gz",
    "classes": {1: "GTV"},
    "relation": "registered",
}
