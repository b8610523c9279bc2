"""Missing modalities: what a segmenter still finds where only some of its input channels are given.

Every non-empty subset of the channels is given in turn; the others are zero, as in training where a channel has no
data. A channel missing everywhere is new to a network unless augmentation ``segmentation_dropout`` showed it. Grid and
body still come from the case, so only intensities go missing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING

from torch import Tensor, nn

from medseg_ssl.analysis import change
from medseg_ssl.analysis.change import OVER_CLASSES, change_table
from medseg_ssl.analysis.metrics import summarize
from medseg_ssl.config import ConfigError
from medseg_ssl.evaluations.base import Evaluation, MetricsConfig
from medseg_ssl.evaluations.segmentation import UNITS, evaluate_cases, labeled_cases
from medseg_ssl.inference.predictor import Predictor
from medseg_ssl.types import Score

if TYPE_CHECKING:
    from medseg_ssl.data.archive import Archive

COLUMNS = ("given", *change.COLUMNS, "p_holm")
SHOWN = ("dice", "nsd")
"""Metrics of the table."""


class MissingModalities(Evaluation):
    """Mean metrics of a segmenter for every non-empty subset of its channels."""

    of, reads_labels = "segmenter", True

    class Config(MetricsConfig):
        """What is scored: nothing beside what is shared."""

    config: Config

    def run(self, model: Predictor, archive: Archive) -> Iterator[Score]:
        """Yield a score per subset and metric (``dice/CT+PT``), the table of cases with the first one.

        Raises:
            ConfigError: ``model`` is no predictor, or one of a single channel.
            UserError: classes of segmenter and archive differ, or no labeled case in the subset.
        """
        if not isinstance(model, Predictor):
            raise ConfigError("missing_modalities scores a segmenter, not an encoder")
        cases = labeled_cases(archive, split=self.config.split, subset=self.config.subset)
        rows = missing_rows(model, archive, cases, nsd_tolerance_mm=self.config.nsd_tolerance_mm)
        table: list[dict[str, object]] | None = rows
        for given in dict.fromkeys(str(row["given"]) for row in rows):
            found = summarize([row for row in rows if row["given"] == given])
            for metric, summary in found.items():
                yield Score(f"{metric}/{given}", summary["mean"], UNITS.get(metric, "share"), table)
                table = None


def missing_rows(
    predictor: Predictor,
    archive: Archive,
    cases: Sequence[str],
    *,
    nsd_tolerance_mm: float,
    on_case: Callable[[str], object] | None = None,
) -> list[dict[str, object]]:
    """Rows of ``segmentation.evaluate_cases`` for every subset, with a column ``given``; fewest channels first.

    Raises:
        ConfigError: a segmenter of a single channel, which can miss nothing.
        UserError: see ``evaluate_cases``.
    """
    rows: list[dict[str, object]] = []
    for shown, name in channel_subsets(predictor.card.modalities):
        of_subset = copy.copy(predictor)
        of_subset.segmenter = Given(predictor.segmenter, shown)
        found = evaluate_cases(of_subset, archive, cases, nsd_tolerance_mm=nsd_tolerance_mm, on_case=on_case)
        rows += [{"given": name, **row} for row in found]
    return rows


def missing_table(
    rows: Sequence[Mapping[str, object]], *, subjects: Mapping[str, str]
) -> list[dict[str, object]]:
    """What each subset costs against all channels, paired by case, with intervals over subjects.

    Args:
        rows: of ``missing_rows``.
        subjects: case to its subject, whose cases are averaged before differences are taken.

    Returns:
        Rows of ``COLUMNS``: mean over the classes of a case first, then per class. ``p`` is that of a paired t-test,
        ``p_holm`` adjusts it over the subsets of one class and metric.
    """
    subsets: dict[object, list[Mapping[str, object]]] = {}
    for row in rows:
        subsets.setdefault(row["given"], []).append(row)
    classes = list(dict.fromkeys(str(row["class"]) for row in rows))
    *_, every = subsets.values()
    changes = [({"given": name}, given) for name, given in subsets.items()]
    return change_table(every, changes, names=(OVER_CLASSES, *classes), metrics=SHOWN, subjects=subjects)


def channel_subsets(modalities: Sequence[str]) -> list[tuple[tuple[int, ...], str]]:
    """Every non-empty subset of the channels and its name, such as ``CT+PT``; equal modalities are numbered.

    Raises:
        ConfigError: a single channel.
    """
    if len(modalities) < 2:
        raise ConfigError(
            f"missing_modalities needs a segmenter of several channels, this one takes {', '.join(modalities)} alone"
        )
    names = [m if list(modalities).count(m) == 1 else f"{m}{i}" for i, m in enumerate(modalities)]
    subsets = [s for size in range(1, len(names) + 1) for s in combinations(range(len(names)), size)]
    return [(shown, "+".join(names[i] for i in shown)) for shown in subsets]


class Given(nn.Module):
    """A segmenter that sees some channels of its input and zero in place of the others."""

    def __init__(self, segmenter: nn.Module, shown: Sequence[int]) -> None:
        super().__init__()
        self.segmenter, self.shown = segmenter, tuple(shown)

    def forward(self, image_BCDHW: Tensor, spacing_mm_B3: Tensor) -> Tensor:
        """Logits (B, K, D, H, W)."""
        seen_BCDHW = image_BCDHW.new_zeros(image_BCDHW.shape)
        shown = list(self.shown)
        seen_BCDHW[:, shown] = image_BCDHW[:, shown]
        return self.segmenter(seen_BCDHW, spacing_mm_B3)
