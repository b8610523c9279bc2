"""Robustness: how much worse a segmenter gets on scans that are noisy, blurred, coarse, biased, cut or off their scale.

Every corruption is applied in physical units (HU, mm, shares of the scan's range) to what the network is about to see,
and the intensity policy's statistics are taken anew from the corrupted scan, as ``prepare`` would take them. Truth and
grid stay, so cases are paired with themselves undisturbed; the subject is the unit of intervals and tests. A corruption
of one modality is tried on the cases that hold it: over others it would cost nothing because it was never there.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field, field_validator

from medseg_ssl.analysis import change
from medseg_ssl.analysis.change import OVER_CLASSES, paired_change
from medseg_ssl.analysis.metrics import METRICS, summarize
from medseg_ssl.analysis.statistics import holm
from medseg_ssl.config import ConfigError
from medseg_ssl.data import intensity
from medseg_ssl.evaluations._corruptions import CORRUPTIONS, Volume, corrupt
from medseg_ssl.evaluations.base import Evaluation, MetricsConfig
from medseg_ssl.evaluations.segmentation import evaluate_cases, labeled_cases
from medseg_ssl.inference.inputs import Channel, policy_for
from medseg_ssl.inference.predictor import Predictor
from medseg_ssl.types import Score

if TYPE_CHECKING:
    from medseg_ssl.data.archive import Archive
    from medseg_ssl.data.manifest import ScanRow

UNDISTURBED = "undisturbed"
CASE_COLUMNS = ("corruption", "severity", "amount", "unit", "case", "class", *METRICS)
COLUMNS = ("corruption", "severity", "amount", "unit", *change.COLUMNS, "p_holm")
SHOWN = ("dice", "nsd")
"""Metrics of the table."""


@dataclass(frozen=True)
class Setting:
    """A corruption at one strength; severity counts from 1, and 0 is the scan as it is."""

    corruption: str
    severity: int
    amount: float
    unit: str

    @property
    def name(self) -> str:
        """For files and scores."""
        return self.corruption if self.corruption == UNDISTURBED else f"{self.corruption}-{self.severity}"


class Robustness(Evaluation):
    """Segmentation metrics under corruptions of graded strength."""

    of, reads_labels = "segmenter", True

    class Config(MetricsConfig):
        """What is done to the scans.

        Attributes:
            strengths: by corruption, from weak to strong; left out ones are not tried. ``noise`` (CT, standard
                deviation in HU), ``relative_noise`` (MR and PET, share of the scan's range), ``blur`` (FWHM in mm),
                ``resolution`` (shortest voxel side in mm), ``bias_field`` (MR, largest coefficient of its logarithm),
                ``missing_slices`` (share), ``shift`` (CT, HU), ``scaling`` (MR and PET, factor).
            seed: of noise, fields and lost slices.
        """

        strengths: dict[str, tuple[float, ...]] = Field(
            default={
                "noise": (20.0, 50.0, 100.0),
                "relative_noise": (0.05, 0.1, 0.2),
                "blur": (2.0, 4.0, 6.0),
                "resolution": (2.0, 4.0, 6.0),
                "bias_field": (0.1, 0.3, 0.5),
                "missing_slices": (0.1, 0.25, 0.5),
                "shift": (20.0, 50.0, 100.0),
                "scaling": (1.1, 1.25, 1.5),
            }
        )
        seed: int = Field(default=0, ge=0)

        @field_validator("strengths")
        @classmethod
        def _known(cls, strengths: dict[str, tuple[float, ...]]) -> dict[str, tuple[float, ...]]:
            for name, amounts in strengths.items():
                if name not in CORRUPTIONS:
                    raise ValueError(f"no corruption named {name!r}; known: {', '.join(CORRUPTIONS)}")
                if not amounts:
                    raise ValueError(f"{name} names no strength; leave it out instead")
                if any(not np.isfinite(a) for a in amounts) or (name != "shift" and min(amounts) <= 0):
                    raise ValueError(f"{name} must be positive numbers, got {list(amounts)}")
            return strengths

    config: Config

    def settings(self, modalities: Iterable[str]) -> list[Setting]:
        """The scan as it is, then every strength of the corruptions that make sense for these modalities."""
        there = set(modalities)
        found = [Setting(UNDISTURBED, 0, 0.0, "")]
        for name, amounts in self.config.strengths.items():
            if CORRUPTIONS[name].modalities & there:
                unit = CORRUPTIONS[name].unit
                found += [Setting(name, i, amount, unit) for i, amount in enumerate(amounts, start=1)]
        return found

    def rows(
        self,
        model: Predictor,
        archive: Archive,
        cases: Sequence[str],
        setting: Setting,
        *,
        on_case: Callable[[str], object] | None = None,
    ) -> list[dict[str, object]]:
        """Rows of ``CASE_COLUMNS`` of the cases under one setting."""
        rows = evaluate_cases(
            model,
            archive,
            cases,
            nsd_tolerance_mm=self.config.nsd_tolerance_mm,
            on_case=on_case,
            alter=partial(_altered, setting=setting, policies=model.card.intensity, seed=self.config.seed),
        )
        return [{**vars(setting), **row} for row in rows]

    def run(self, model: Predictor, archive: Archive) -> Iterator[Score]:
        """Yield mean Dice and NSD of every setting as ``noise-1/dice``, each with its table of cases.

        Where a setting changes some of the cases alone, its means are over these, and ``noise-1/undisturbed/dice`` is
        what the same cases score undisturbed.

        Raises:
            ConfigError: ``model`` is no predictor.
            UserError: classes of segmenter and archive differ, or no labeled case in the subset.
        """
        if not isinstance(model, Predictor):
            raise ConfigError("robustness scores a segmenter, not an encoder; that is 'medseg-ssl evaluate'")
        cases = labeled_cases(archive, split=self.config.split, subset=self.config.subset)
        clean: list[dict[str, object]] = []
        for setting in self.settings(modalities_of(archive, cases)):
            chosen = touched(archive, cases, setting)
            rows = self.rows(model, archive, chosen, setting)
            clean = rows if setting.corruption == UNDISTURBED else clean
            table: list[dict[str, object]] | None = rows
            for metric, found in summarize(rows, SHOWN).items():
                yield Score(f"{setting.name}/{metric}", found["mean"], "share", table)
                table = None
            if len(chosen) < len(cases):
                for metric, found in summarize(_of(clean, chosen), SHOWN).items():
                    yield Score(f"{setting.name}/{UNDISTURBED}/{metric}", found["mean"], "share")


def modalities_of(archive: Archive, cases: Iterable[str]) -> set[str]:
    """What the cases at hand are scanned with, whatever else the segmenter may know."""
    return {archive.scans[key].modality for case in cases for key in archive.cases[case].scans}


def touched(archive: Archive, cases: Sequence[str], setting: Setting) -> list[str]:
    """The cases that hold a scan which the setting changes; all of them where nothing is disturbed."""
    if setting.corruption == UNDISTURBED:
        return list(cases)
    wanted = CORRUPTIONS[setting.corruption].modalities
    return [case for case in cases if wanted & modalities_of(archive, [case])]


def robustness_table(
    rows: Sequence[Mapping[str, object]], *, subjects: Mapping[str, str]
) -> list[dict[str, object]]:
    """What each setting costs: the mean difference to the undisturbed scans, paired by case, with its interval.

    Args:
        rows: of ``CASE_COLUMNS``, of all settings; a setting is compared on the cases that it has rows of.
        subjects: case to its subject, whose cases are averaged before differences are taken.

    Returns:
        Rows of ``COLUMNS``: mean over the classes of a case first, then per class. ``p`` is that of a paired t-test,
        ``p_holm`` adjusts it over the settings of one class and metric.
    """
    settings: dict[tuple[object, object], list[Mapping[str, object]]] = {}
    for row in rows:
        settings.setdefault((row["corruption"], row["severity"]), []).append(row)
    clean = settings[UNDISTURBED, 0]
    pairs = [(_of(clean, {row["case"] for row in given}), given) for given in settings.values()]
    table: list[dict[str, object]] = []
    for metric in SHOWN:
        for name in (OVER_CLASSES, *dict.fromkeys(str(row["class"]) for row in rows)):
            block = []
            for before, after in pairs:
                found = paired_change(before, after, name=name, metric=metric, subjects=subjects)
                if found is not None:
                    head = {key: after[0][key] for key in ("corruption", "severity", "amount", "unit")}
                    block.append({**head, **found} | ({"p": float("nan")} if after is clean else {}))
            adjusted = holm([row["p"] for row in block])
            table += [{**row, "p_holm": p} for row, p in zip(block, adjusted, strict=True)]
    return table


def _of(rows: Iterable[Mapping[str, object]], cases: Container[object]) -> list[Mapping[str, object]]:
    return [row for row in rows if row["case"] in cases]


def _altered(
    row: ScanRow, channel: Channel, *, setting: Setting, policies: Mapping[str, object], seed: int
) -> Channel:
    """The channel corrupted, with the line of the policy for what became of it; another modality's stays as it is."""
    array_DHW, valid = channel.array_DHW, channel.valid
    applies = setting.corruption in CORRUPTIONS and row.modality in CORRUPTIONS[setting.corruption].modalities
    if applies:
        spread = row.statistics.p995 - row.statistics.p005
        volume = Volume(array_DHW, valid, row.spacing_mm, spread, row.content_hash)
        array_DHW, valid = corrupt(setting.corruption, volume, setting.amount, seed=seed)
    if valid is not None and not valid.any():
        return channel
    unit = intensity.unit_of(row)
    statistics = intensity.statistics(array_DHW, valid, modality=row.modality, unit=unit)
    line = intensity.linear(policy_for(policies, row.modality), statistics, unit=unit)
    return Channel(array_DHW, valid, channel.affine_44, line)
