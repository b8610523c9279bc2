"""Otsu's thresholds of a case's intensities; which levels are which class is learned from the labeled cases.

Otsu, IEEE Trans. SMC 9 (1979), 10.1109/TSMC.1979.4310076; several levels: Liao et al., J. Inf. Sci. Eng. 17 (2001).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field, NonNegativeFloat, field_validator

from medseg_ssl.baselines import _parts
from medseg_ssl.baselines._cases import Channels, Seen, check_training, example, see, to_label_grid
from medseg_ssl.baselines._classical import check_library, otsu_thresholds
from medseg_ssl.baselines.base import Baseline, BaselineConfig

if TYPE_CHECKING:
    from medseg_ssl.data.archive import Archive

_Setting = tuple[int, int]
"""Channel and number of levels."""


class Threshold(Baseline):
    """Levels of one channel inside the body, each class some of them; everything is chosen by training Dice."""

    class Config(BaselineConfig):
        """What is tried.

        Attributes:
            levels: numbers of levels a channel is parted into; 2 is Otsu's threshold.
            openings_mm: radii of a morphological opening of the result, 0 for none.
            bins: of the histogram.
        """

        levels: tuple[int, ...] = (2, 3, 4)
        openings_mm: tuple[NonNegativeFloat, ...] = Field(default=(0.0,), min_length=1)
        bins: int = Field(default=128, ge=16, le=1024)

        @field_validator("levels")
        @classmethod
        def _few(cls, value: tuple[int, ...]) -> tuple[int, ...]:
            if not value or min(value) < 2 or max(value) > 5:
                raise ValueError("levels must be numbers from 2 to 5")
            return value

    config: Config

    def fit(self, archive: Archive, cases: Sequence[str], *, seed: int) -> None:
        """Choose channel, number of levels, levels of each class and cleaning; ``seed`` decides nothing."""
        check_library()
        check_training(archive, cases)
        self._policies = archive.intensity

        def learn(members: list[str]) -> dict[int, _parts.Choice[_Setting]]:
            examples = [example(archive, case, self._policies) for case in members]
            channels = range(len(examples[0].seen.image_CDHW))
            settings = [(channel, levels) for channel in channels for levels in self.config.levels]
            return _parts.choose(examples, settings, self._levels, openings_mm=self.config.openings_mm)

        self._choices = Channels(archive, cases, learn)

    def predict_cases(self, archive: Archive, cases: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
        """Yield each case with its label map; thresholds are each case's own."""
        for case in cases:
            choices = self._choices.of(archive, case)
            seen = see(archive, case, self._policies)
            label_DHW = _parts.predict(seen, choices, self._levels)
            yield case, to_label_grid(archive, case, label_DHW, seen.affine_44)

    def _levels(self, seen: Seen, setting: _Setting) -> tuple[np.ndarray, int]:
        channel, levels = setting
        values_DHW = seen.image_CDHW[channel]
        found = otsu_thresholds(values_DHW[seen.body_DHW], levels=levels, bins=self.config.bins)
        parts_DHW = np.digitize(values_DHW, found).astype(np.uint8) + np.uint8(1)
        return np.where(seen.body_DHW, parts_DHW, np.uint8(0)), levels
