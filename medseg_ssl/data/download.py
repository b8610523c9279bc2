"""Public tasks of the Medical Segmentation Decathlon, fetched through MONAI and checked by their hash."""

from __future__ import annotations

import difflib
import logging
import shutil
from pathlib import Path

from medseg_ssl.config import ConfigError, UserError

TASKS = (
    "Task01_BrainTumour",
    "Task02_Heart",
    "Task03_Liver",
    "Task04_Hippocampus",
    "Task05_Prostate",
    "Task06_Lung",
    "Task07_Pancreas",
    "Task08_HepaticVessel",
    "Task09_Spleen",
    "Task10_Colon",
)


def download_task(task: str, folder: Path) -> Path:
    """Fetch a Decathlon task and unpack it below ``folder``; what is there already is not fetched again.

    Args:
        task: one of ``TASKS``.
        folder: where ``<task>.tar`` and ``<task>/`` go.

    Returns:
        The task's folder, a root for the source ``msd``.

    Raises:
        ConfigError: no task of this name.
        UserError: it could not be fetched or unpacked, or its hash is not the published one.
    """
    if task not in TASKS:
        close = difflib.get_close_matches(task, TASKS, n=1, cutoff=0.3)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ConfigError(f"no Decathlon task named {task!r}{hint}; known: {', '.join(TASKS)}")
    target = Path(folder) / task
    if (target / "dataset.json").is_file():
        return target
    # importing monai takes seconds, so only a real download pays for it
    from monai.apps.datasets import DecathlonDataset
    from monai.apps.utils import download_url, extractall

    archive, partial = Path(folder) / f"{task}.tar", Path(folder) / f".{task}.partial"
    # monai logs a failure before it raises it; the one line of the error says the same
    logging.getLogger("monai.apps").setLevel(logging.CRITICAL)
    url, md5 = DecathlonDataset.resource[task], DecathlonDataset.md5[task]
    try:
        archive.parent.mkdir(parents=True, exist_ok=True)
        download_url(url, archive, hash_val=md5, hash_type="md5", progress=False)
        shutil.rmtree(partial, ignore_errors=True)
        extractall(archive, partial, hash_val=md5, hash_type="md5")
        # an unpacking that was interrupted must not look like a whole task
        (partial / task).replace(target)
        shutil.rmtree(partial, ignore_errors=True)
    except (OSError, RuntimeError, ValueError, EOFError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"could not fetch {task} into {folder}: {reason}") from error
    if not (target / "dataset.json").is_file():
        raise UserError(f"the download of {task} holds no dataset.json; delete {archive} and try again")
    return target
