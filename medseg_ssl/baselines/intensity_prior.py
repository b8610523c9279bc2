"""Naive Bayes at each voxel: how often a class has this intensity, and how often it stands at this relative place.

Intensities of each channel enter by smoothed histograms of the labeled cases, places by their mean label, blurred so
that a place some way off is possible too. Channels and place count as independent given the class.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field
from scipy.ndimage import gaussian_filter, gaussian_filter1d

from medseg_ssl.baselines._cases import Channels, Example, check_training, example, see, to_label_grid
from medseg_ssl.baselines._places import Frame, MeanLabel, PlacesConfig
from medseg_ssl.baselines.base import Baseline
from medseg_ssl.types import UNKNOWN_LABEL

if TYPE_CHECKING:
    from medseg_ssl.data.archive import Archive

_RANGE = (-3.0, 5.0)
"""Intensities of every policy lie about here; what lies beyond counts as the end."""
_RARE = 1e-4
"""Share that stands for never: no single channel or place forbids a class."""


class IntensityPrior(Baseline):
    """The class with the largest product of likelihoods of intensities and frequency at the place."""

    class Config(PlacesConfig):
        """How likelihoods are made.

        Attributes:
            blur: of the mean label, in shares of the box.
            bins: of the histograms.
            bin_blur: of the histograms, in bins.
            smoothing_mm: of the log-posterior before the largest one wins; 0 decides voxel by voxel.
        """

        frame: Frame = "body"
        blur: float = Field(default=0.04, ge=0.0, le=0.5)
        bins: int = Field(default=64, ge=4, le=1024)
        bin_blur: float = Field(default=1.5, ge=0.0)
        smoothing_mm: float = Field(default=1.0, ge=0.0)

    config: Config

    def fit(self, archive: Archive, cases: Sequence[str], *, seed: int) -> None:
        """Count intensities and places; ``seed`` decides nothing."""
        check_training(archive, cases)
        self._policies = archive.intensity
        self._labels = MeanLabel.of(archive, cases, frame=self.config.frame, size=self.config.lattice)
        mean_KDHW = self._labels.mean_KDHW()
        blur = self.config.blur * np.array(self.config.lattice)
        self._mean_KDHW = np.stack([gaussian_filter(share, blur, mode="nearest") for share in mean_KDHW])
        # a class that no case shows stays impossible
        self._possible = mean_KDHW.reshape(len(mean_KDHW), -1).any(axis=1)

        def learn(members: list[str]) -> np.ndarray:
            return self._likelihoods([example(archive, case, self._policies) for case in members])

        self._likelihood = Channels(archive, cases, learn)

    def predict_cases(self, archive: Archive, cases: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
        """Yield each case with its label map."""
        for case in cases:
            likelihood_CKN = self._likelihood.of(archive, case)
            seen = see(archive, case, self._policies)
            posterior_KDHW = np.log(self._labels.at(self._mean_KDHW, archive, case) + _RARE)
            for image_DHW, likelihood_KN in zip(seen.image_CDHW, likelihood_CKN, strict=True):
                posterior_KDHW += likelihood_KN[:, self._bin(image_DHW)]
            if self.config.smoothing_mm:
                sigma = self.config.smoothing_mm / np.array(seen.spacing_mm)
                posterior_KDHW = np.stack([gaussian_filter(p, sigma, mode="nearest") for p in posterior_KDHW])
            posterior_KDHW[~self._possible] = -np.inf
            label_DHW = posterior_KDHW.argmax(axis=0).astype(np.uint8)
            yield case, to_label_grid(archive, case, label_DHW, seen.affine_44)

    def _likelihoods(self, examples: Sequence[Example]) -> np.ndarray:
        """Log-likelihood (C, K, bins) of the intensities of each channel, over the cases that state a class.

        A class that these cases do not show is as likely as everything together.
        """
        shape = (len(examples[0].seen.image_CDHW), len(examples[0].known), self.config.bins)
        counts_CKN = np.zeros(shape)
        for found in examples:
            for counts_KN, image_DHW in zip(counts_CKN, found.seen.image_CDHW, strict=True):
                bins_DHW = self._bin(image_DHW)
                for value in np.flatnonzero(found.known):
                    inside_DHW = (found.label_DHW == value) & (found.label_DHW != UNKNOWN_LABEL)
                    counts_KN[value] += np.bincount(bins_DHW[inside_DHW], minlength=self.config.bins)
        unseen_CK1 = counts_CKN.sum(axis=2, keepdims=True) == 0
        counts_CKN = np.where(unseen_CK1, counts_CKN.sum(axis=1, keepdims=True), counts_CKN)
        if self.config.bin_blur:
            counts_CKN = gaussian_filter1d(counts_CKN, self.config.bin_blur, axis=2, mode="nearest")
        return np.log(counts_CKN / counts_CKN.sum(axis=2, keepdims=True) + _RARE)

    def _bin(self, image_DHW: np.ndarray) -> np.ndarray:
        low, high = _RANGE
        scaled_DHW = (image_DHW - low) * (self.config.bins / (high - low))
        return np.clip(scaled_DHW, 0, self.config.bins - 1).astype(np.intp)
