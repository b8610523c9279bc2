"""Which parts of a case (levels of intensity, clusters) are which class: chosen by Dice on the training cases."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, combinations
from typing import Generic, TypeVar

import numpy as np
from pydantic import Field, NonNegativeFloat

from medseg_ssl.baselines._cases import Example, Seen
from medseg_ssl.baselines._classical import largest_piece, opened
from medseg_ssl.baselines.base import BaselineConfig

S = TypeVar("S", bound=Hashable)

PartsOf = Callable[[Seen, S], tuple[np.ndarray, int]]
"""A case's part map under a setting (uint8; 1, 2, … inside the body, 0 elsewhere), and how many parts there may be."""


class PartsConfig(BaselineConfig):
    """How a class is cleaned once its parts are chosen.

    Attributes:
        openings_mm: radii of a morphological opening of the result that are tried, 0 for none.
    """

    openings_mm: tuple[NonNegativeFloat, ...] = Field(default=(0.0,), min_length=1)


@dataclass(frozen=True)
class Choice(Generic[S]):
    """What is a class.

    Attributes:
        setting: how the case is parted.
        parts: numbers of the parts that are the class.
        opening_mm: radius of the opening, 0 for none.
        largest: whether the largest connected piece alone counts.
        dice: mean over the training cases.
    """

    setting: S
    parts: tuple[int, ...]
    opening_mm: float
    largest: bool
    dice: float


def choose(
    examples: Sequence[Example], settings: Sequence[S], parts_of: PartsOf[S], *, openings_mm: Sequence[float]
) -> dict[int, Choice[S]]:
    """For each class that some case states and shows, the choice with the best mean Dice; the first one of equals."""
    tried: dict[tuple[S, tuple[int, ...], float, bool], list[np.ndarray]] = {}
    for example in examples:
        shown = _shown(example)
        for setting in settings:
            parts_DHW, count = parts_of(example.seen, setting)
            for subset in _subsets(count):
                for (opening_mm, largest), region_DHW in _cleaned(
                    parts_DHW, subset, example.seen, openings_mm
                ):
                    scores_K = _dice_of_classes(region_DHW, example.label_DHW, len(example.known))
                    tried.setdefault((setting, subset, opening_mm, largest), []).append(
                        np.where(shown, scores_K, np.nan)
                    )
    best: dict[int, Choice[S]] = {}
    for key, scores in tried.items():
        scores_NK = np.stack(scores)
        for value in np.flatnonzero(~np.isnan(scores_NK).all(axis=0)).tolist():
            mean = float(np.nanmean(scores_NK[:, value]))
            if value and mean > (best[value].dice if value in best else 0.0):
                best[value] = Choice(*key, mean)
    return best


def predict(seen: Seen, choices: dict[int, Choice[S]], parts_of: PartsOf[S]) -> np.ndarray:
    """Label map (uint8) on the grid of the case; where classes claim one voxel, the better one in training has it."""
    label_DHW = np.zeros(seen.body_DHW.shape, np.uint8)
    parts = {choice.setting: parts_of(seen, choice.setting)[0] for choice in choices.values()}
    for value, choice in sorted(choices.items(), key=lambda item: item[1].dice):
        region_DHW = np.isin(parts[choice.setting], choice.parts)
        region_DHW = opened(region_DHW, choice.opening_mm, spacing_mm=seen.spacing_mm)
        label_DHW[largest_piece(region_DHW) if choice.largest else region_DHW] = value
    return label_DHW


def _shown(example: Example) -> np.ndarray:
    counts = np.bincount(example.label_DHW.ravel(), minlength=len(example.known))[: len(example.known)]
    return np.array(example.known) & (counts > 0)


def _subsets(count: int) -> Iterator[tuple[int, ...]]:
    parts = range(1, count + 1)
    return chain.from_iterable(combinations(parts, n) for n in range(1, count + 1))


def _cleaned(
    parts_DHW: np.ndarray, subset: tuple[int, ...], seen: Seen, openings_mm: Sequence[float]
) -> Iterator[tuple[tuple[float, bool], np.ndarray]]:
    region_DHW = np.isin(parts_DHW, subset)
    for opening_mm in openings_mm:
        kept_DHW = opened(region_DHW, opening_mm, spacing_mm=seen.spacing_mm)
        yield (opening_mm, False), kept_DHW
        yield (opening_mm, True), largest_piece(kept_DHW)


def _dice_of_classes(region_DHW: np.ndarray, label_DHW: np.ndarray, count: int) -> np.ndarray:
    """Dice (K,) of a region and each class, unknown voxels left out."""
    whole_K = np.bincount(label_DHW.ravel(), minlength=count)[:count]
    inside_K = np.bincount(label_DHW[region_DHW], minlength=count)[:count]
    return 2 * inside_K / np.maximum(1, inside_K.sum() + whole_K)
