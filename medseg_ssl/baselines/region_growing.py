"""Regions grown from a seed: voxels connected to it whose intensity lies in an interval, up to some distance.

Adams and Bischof, IEEE TPAMI 16 (1994), 10.1109/34.295913, in the form of a connected threshold. The seed stands near
the mean place of the class in the labeled cases, where the intensity is most like theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from pydantic import Field, NonNegativeFloat, PositiveFloat, field_validator
from scipy.ndimage import gaussian_filter

from medseg_ssl.baselines._cases import Example, Seen, dice
from medseg_ssl.baselines._classical import flood
from medseg_ssl.baselines._examples import FromExamples
from medseg_ssl.baselines._places import Box
from medseg_ssl.baselines.base import BaselineConfig
from medseg_ssl.data.intensity import foreground_box


class _Place(NamedTuple):
    """Of a class: its mean place in shares of the body's box, and its largest reach from there in mm."""

    relative: np.ndarray
    reach_mm: float


class _Rule(NamedTuple):
    """How a class is grown.

    Attributes:
        channel: whose intensities count.
        low: smallest intensity of the region.
        high: largest intensity of the region.
        typical: intensity a seed should have.
        radius_mm: of the ball about the seed that holds the region.
        dice: mean over the training cases.
    """

    channel: int
    low: float
    high: float
    typical: float
    radius_mm: float
    dice: float


_Rules = dict[int, tuple[_Place, _Rule]]


class RegionGrowing(FromExamples[_Rules]):
    """A region per class; channel, interval and reach are those with the best training Dice."""

    class Config(BaselineConfig):
        """What is tried.

        Attributes:
            smoothing_mm: of the image in which regions grow; 0 for none.
            search_mm: distance from the expected place within which the seed is looked for.
            intervals: percentiles of the class's training intensities that bound the region.
            reaches: radius of the region, in units of the largest distance of a training voxel from the class's middle.
        """

        smoothing_mm: NonNegativeFloat = 1.0
        search_mm: NonNegativeFloat = 5.0
        intervals: tuple[tuple[float, float], ...] = ((1, 99), (5, 95), (10, 90), (20, 80))
        reaches: tuple[PositiveFloat, ...] = Field(default=(0.5, 0.75, 1.0, 1.5), min_length=1)

        @field_validator("intervals")
        @classmethod
        def _rising(cls, value: tuple[tuple[float, float], ...]) -> tuple[tuple[float, float], ...]:
            if not value or not all(0 <= low < high <= 100 for low, high in value):
                raise ValueError("intervals must be rising pairs of percentiles from 0 to 100")
            return value

    config: Config

    def learn(self, examples: Sequence[Example]) -> _Rules:
        """Learn places and choose the rule of each class."""
        found = {}
        for value in range(1, len(examples[0].known)):
            showing = [e for e in examples if e.known[value] and (e.label_DHW == value).any()]
            rule = self._learn(value, showing) if showing else None
            if rule is not None:
                found[value] = rule
        return found

    def label(self, model: _Rules, seen: Seen) -> np.ndarray:
        """Label map (uint8); where regions meet, the better class in training has the voxel."""
        smooth = {rule.channel: self._smooth(seen, rule.channel) for _, rule in model.values()}
        label_DHW = np.zeros(seen.body_DHW.shape, np.uint8)
        for value, (place, rule) in sorted(model.items(), key=lambda item: item[1][1].dice):
            label_DHW[self._grown(seen, smooth[rule.channel], place, rule)] = value
        return label_DHW

    def _learn(self, value: int, examples: Sequence[Example]) -> tuple[_Place, _Rule] | None:
        """None where no rule finds any voxel of the class."""
        place = _mean_place(value, examples)
        best: _Rule | None = None
        for channel in range(len(examples[0].seen.image_CDHW)):
            smooth = [self._smooth(e.seen, channel) for e in examples]
            inside_N = np.concatenate(
                [image[e.label_DHW == value] for image, e in zip(smooth, examples, strict=True)]
            )
            typical = float(np.median(inside_N))
            for interval in self.config.intervals:
                low, high = (float(v) for v in np.percentile(inside_N, interval))
                for reach in self.config.reaches:
                    rule = _Rule(channel, low, high, typical, reach * place.reach_mm, 0.0)
                    scores = [
                        dice(self._grown(e.seen, image, place, rule), e.label_DHW, value)
                        for image, e in zip(smooth, examples, strict=True)
                    ]
                    mean = float(np.mean(scores))
                    if mean > (best.dice if best else 0.0):
                        best = rule._replace(dice=mean)
        return None if best is None else (place, best)

    def _smooth(self, seen: Seen, channel: int) -> np.ndarray:
        if not self.config.smoothing_mm:
            return seen.image_CDHW[channel]
        sigma = self.config.smoothing_mm / np.array(seen.spacing_mm)
        return gaussian_filter(seen.image_CDHW[channel], sigma, mode="nearest")

    def _grown(self, seen: Seen, image_DHW: np.ndarray, place: _Place, rule: _Rule) -> np.ndarray:
        """Bool (D, H, W); nothing where no body voxel near the expected place has an intensity of the interval."""
        region_DHW = np.zeros(seen.body_DHW.shape, bool)
        expected = _body_box(seen).index(place.relative)
        allowed_DHW = seen.body_DHW & (image_DHW >= rule.low) & (image_DHW <= rule.high)
        box, apart_mm_DHW = _ball(expected, self.config.search_mm, seen)
        unlike_DHW = np.where(
            allowed_DHW[box] & (apart_mm_DHW <= self.config.search_mm),
            np.abs(image_DHW[box] - rule.typical),
            np.inf,
        )
        if not np.isfinite(unlike_DHW).any():
            return region_DHW
        # of equally likely seeds the one nearest to the expected place
        likely_DHW = unlike_DHW == unlike_DHW.min()
        at = np.unravel_index(np.where(likely_DHW, apart_mm_DHW, np.inf).argmin(), apart_mm_DHW.shape)
        found = np.array([int(i) + part.start for i, part in zip(at, box, strict=True)])
        box, apart_mm_DHW = _ball(found.astype(float), rule.radius_mm, seen)
        d, h, w = (int(i) - part.start for i, part in zip(found, box, strict=True))
        region_DHW[box] = flood(allowed_DHW[box] & (apart_mm_DHW <= rule.radius_mm), (d, h, w))
        return region_DHW


def _mean_place(value: int, examples: Sequence[Example]) -> _Place:
    places, reach_mm = [], 0.0
    for found in examples:
        index_N3 = np.argwhere(found.label_DHW == value)
        middle = index_N3.mean(axis=0)
        places.append(_body_box(found.seen).relative(middle))
        apart_mm_N = np.linalg.norm((index_N3 - middle) * found.seen.spacing_mm, axis=1)
        reach_mm = max(reach_mm, float(apart_mm_N.max()), max(found.seen.spacing_mm))
    return _Place(np.mean(places, axis=0), reach_mm)


def _body_box(seen: Seen) -> Box:
    start, stop = foreground_box(seen.body_DHW)
    return Box(np.array(start), np.array(stop))


def _ball(centre: np.ndarray, radius_mm: float, seen: Seen) -> tuple[tuple[slice, ...], np.ndarray]:
    """The box of voxels that holds a ball, at least the voxel of its centre, and their distances (mm) from that."""
    shape, spacing = np.array(seen.body_DHW.shape), np.array(seen.spacing_mm)
    nearest = np.clip(np.round(centre), 0, shape - 1)
    start = np.clip(np.floor(centre - radius_mm / spacing), 0, nearest).astype(int)
    stop = np.clip(np.ceil(centre + radius_mm / spacing), nearest, shape - 1).astype(int) + 1
    box = tuple(slice(int(a), int(b)) for a, b in zip(start, stop, strict=True))
    apart = [
        (np.arange(part.start, part.stop) - nearest[axis]) * spacing[axis] for axis, part in enumerate(box)
    ]
    d, h, w = np.meshgrid(*apart, indexing="ij", sparse=True)
    return box, np.sqrt(d**2 + h**2 + w**2)
