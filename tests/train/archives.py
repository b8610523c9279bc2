"""A small archive on disk (registered CT and MR of a few subjects, with labels), written without reading any file."""

from pathlib import Path

import numpy as np
import pytest

from medseg_ssl.data import groupwise
from medseg_ssl.data.archive import Archive
from medseg_ssl.data.archive_writer import ArchiveWriter
from medseg_ssl.data.manifest import CaseRow, PairRow, Split
from medseg_ssl.data.store import write_label, write_volume
from tests.data.small_archive import RECIPE, scan_row

SHAPE = (20, 22, 24)


def quick_templates(patch: pytest.MonkeyPatch, *, rounds: tuple[tuple[int, int], ...] = ((5, 5),)) -> None:
    """Few steps of registration, where a test needs a template and not a good one."""
    patch.setattr(groupwise, "ROUNDS", rounds)
    patch.setattr(groupwise, "FINAL", (5, 5, 5))


TRAIN, DEVELOPMENT, TEST = ("s0", "s1", "s2", "s3"), ("s4", "s5"), ("s6", "s7")


def volumes(number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """CT in HU, raw MR and the label of a ball-shaped organ in a ball-shaped body."""
    generator = np.random.default_rng(number)
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in SHAPE), indexing="ij")
    shift = generator.uniform(-0.2, 0.2, 3)
    body = z**2 + y**2 + x**2 < 0.9
    organ = (z - shift[0]) ** 2 + (y - shift[1]) ** 2 + (x - shift[2]) ** 2 < 0.2
    noise = generator.normal(0, 10, (2, *SHAPE))
    ct = np.where(organ, 150.0, np.where(body, 20.0, -1000.0)) + noise[0]
    mr = np.where(organ, 300.0, np.where(body, 100.0, 0.0)) + noise[1]
    return ct, mr, organ


def write_archive(
    path: Path,
    *,
    labels: bool = True,
    broken: str = "",
    known: tuple[bool, ...] = (True, True),
    stating: tuple[str, ...] = (),
    classes: tuple[str, str] = ("background", "organ"),
    channels: tuple[str, ...] = ("CT",),
    labeled_mr: bool = False,
    turned: tuple[str, ...] = (),
) -> Archive:
    """Eight subjects; the scan named ``broken`` (such as ``s1-MR``) holds no data anywhere; a case has these channels.

    The annotator stated the classes ``known``, in the subjects ``stating`` all of them. ``labeled_mr`` gives the
    label to the MR scan as a case of its own too. The label of the subjects ``turned`` is upside down.
    """
    writer = ArchiveWriter.open(path, RECIPE, classes if labels else ())
    scans, cases, pairs = [], [], []
    for number, subject in enumerate((*TRAIN, *DEVELOPMENT, *TEST)):
        ct, mr, organ = volumes(number)
        for modality, array in (("CT", ct), ("MR", mr)):
            key = f"{subject}-{modality}"
            row = scan_row(
                key, SHAPE, subject=subject, modality=modality, threshold=-300 if modality == "CT" else 50
            )
            stored = np.full(SHAPE, -32768) if key == broken else array
            write_volume(path, stored.astype(np.int16), row, recipe=RECIPE, stamp="")
            scans.append(row)
        stated = ((True, True) if subject in stating else known) if labels else ()
        scan = tuple(f"{subject}-{modality}" for modality in channels)
        case = CaseRow(
            case=f"case-{subject}", subject=subject, scans=scan, labeled=labels, known_classes=stated
        )
        if labels:
            affine = np.array(scans[-2].affine_44)
            label = (organ[::-1] if subject in turned else organ).astype(np.uint8)
            label_args = {"original_DHW": label, "original_affine_44": affine, "recipe": RECIPE, "stamp": ""}
            write_label(path, case.case, label, **label_args)
        cases.append(case)
        known_mr = {"labeled": True, "known_classes": stated} if labeled_mr else {"labeled": False}
        mr_case = CaseRow(case=f"mr-{subject}", subject=subject, scans=(f"{subject}-MR",), **known_mr)
        if labeled_mr:
            write_label(path, mr_case.case, label, **label_args)
        cases.append(mr_case)
        pairs.append(PairRow(scan_a=f"{subject}-CT", scan_b=f"{subject}-MR", relation="registered"))
    split = Split(name="default", seed=0, train=TRAIN, development=DEVELOPMENT, test=TEST)
    return writer.commit(scans, cases, pairs, splits=[split])
