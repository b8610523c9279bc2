"""nnU-Net v2's own data loader for ``benchmarks/loader.py``; runs under the peer's Python, needs nothing of ours.

Usage: ``python loader_peer.py FOLDER``. FOLDER holds ``image_I.npy`` (normalised float32) and ``label_I.npy``. Reads
one JSON request per line, ``{"size", "augment", "patches"}``, and answers
``{"wall_s", "cpu_s", "patches"}``.
"""

import json
import os
import sys
import time
import warnings
from pathlib import Path

# nnU-Net reads these when it is imported, and warns without them
os.environ.update({name: sys.argv[1] for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")})

import numpy as np
import torch
from nnunetv2.training.data_augmentation.compute_initial_patch_size import get_patch_size
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.label_handling.label_handling import LabelManager

BATCH = 2
ROTATION = (-30 / 360 * 2 * np.pi, 30 / 360 * 2 * np.pi)


def store(folder: Path, size: int) -> Path:
    """Write the volumes as nnU-Net's preprocessing does for this patch size."""
    out = folder / f"nnunet_{size}"
    if out.is_dir():
        return out
    out.mkdir()
    for file in sorted(folder.glob("image_*.npy")):
        image, label = np.load(file)[None], np.load(file.with_name(file.name.replace("image", "label")))[None]
        places = {}
        for value in np.unique(label)[1:]:
            found = np.argwhere(label == value)
            chosen = np.random.default_rng(0).choice(len(found), min(10_000, len(found)), replace=False)
            places[int(value)] = found[chosen]
        blocks, chunks = comp_blosc2_params(image.shape, (size,) * 3, 4)
        name = str(out / file.stem)
        properties = {"class_locations": places}
        nnUNetDatasetBlosc2.save_case(image, label.astype(np.int8), properties, name, chunks, blocks)
    return out


def loader(folder: Path, size: int, augment: bool) -> nnUNetDataLoader:
    """As ``nnUNetTrainer.get_dataloaders`` builds it, without the processes around it."""
    dataset = nnUNetDatasetBlosc2(str(store(folder, size)))
    classes = int(max(np.load(f).max() for f in folder.glob("label_*.npy")))
    labels = LabelManager({"background": 0, **{f"class {i}": i for i in range(1, classes + 1)}}, None)
    final = (size,) * 3
    transforms = None
    initial = final
    if augment:
        transforms = nnUNetTrainer.get_training_transforms(
            final, ROTATION, None, mirror_axes=(0, 1, 2), do_dummy_2d_data_aug=False
        )
        initial = get_patch_size(final, ROTATION, ROTATION, ROTATION, (0.85, 1.25))
    return nnUNetDataLoader(
        dataset, BATCH, initial, final, labels, oversample_foreground_percent=0.33, transforms=transforms
    )


def main() -> None:
    """Answer requests until the input ends."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    loaders: dict[tuple[int, bool], nnUNetDataLoader] = {}
    for line in sys.stdin:
        request = json.loads(line)
        key = request["size"], request["augment"]
        if key not in loaders:
            loaders[key] = loader(folder, *key)
        wall, cpu, patches = time.perf_counter(), time.process_time(), 0
        while patches < request["patches"]:
            patches += len(loaders[key].generate_train_batch()["data"])
        answer = {
            "wall_s": time.perf_counter() - wall,
            "cpu_s": time.process_time() - cpu,
            "patches": patches,
        }
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
