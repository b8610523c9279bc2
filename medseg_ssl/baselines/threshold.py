"""Otsu's thresholds of a case's intensities; which levels are which class is learned from the labeled cases.

Otsu, IEEE Trans. SMC 9 (1979), 10.1109/TSMC.1979.4310076; several levels: Liao et al., J. Inf. Sci. Eng. 17 (2001).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import Field, field_validator

from medseg_ssl.baselines import _parts
from medseg_ssl.baselines._cases import Example, Seen
from medseg_ssl.baselines._classical import otsu_thresholds
from medseg_ssl.baselines._examples import FromExamples

_Setting = tuple[int, int]
"""Channel and number of levels."""
_Choices = dict[int, _parts.Choice[_Setting]]


class Threshold(FromExamples[_Choices]):
    """Levels of one channel inside the body, each class some of them; everything is chosen by training Dice."""

    class Config(_parts.PartsConfig):
        """What is tried.

        Attributes:
            levels: numbers of levels a channel is parted into; 2 is Otsu's threshold.
            bins: of the histogram.
        """

        levels: tuple[int, ...] = (2, 3, 4)
        bins: int = Field(default=128, ge=16, le=1024)

        @field_validator("levels")
        @classmethod
        def _few(cls, value: tuple[int, ...]) -> tuple[int, ...]:
            if not value or min(value) < 2 or max(value) > 5:
                raise ValueError("levels must be numbers from 2 to 5")
            return value

    config: Config

    def learn(self, examples: Sequence[Example]) -> _Choices:
        """Choose channel, number of levels, levels of each class and cleaning."""
        channels = range(len(examples[0].seen.image_CDHW))
        settings = [(channel, levels) for channel in channels for levels in self.config.levels]
        return _parts.choose(examples, settings, self._levels, openings_mm=self.config.openings_mm)

    def label(self, model: _Choices, seen: Seen) -> np.ndarray:
        """Label map (uint8); thresholds are the case's own."""
        return _parts.predict(seen, model, self._levels)

    def _levels(self, seen: Seen, setting: _Setting) -> tuple[np.ndarray, int]:
        channel, levels = setting
        values_DHW = seen.image_CDHW[channel]
        found = otsu_thresholds(values_DHW[seen.body_DHW], levels=levels, bins=self.config.bins)
        parts_DHW = np.digitize(values_DHW, found).astype(np.uint8) + np.uint8(1)
        return np.where(seen.body_DHW, parts_DHW, np.uint8(0)), levels
