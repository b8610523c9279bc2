"""Labels of an archive told in the classes of a segmenter that knows other ones too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from medseg_ssl.config import ConfigError
from medseg_ssl.types import UNKNOWN_LABEL, Batch, View


@dataclass(frozen=True)
class Relabeling:
    """Where the classes of an archive stand among those of a segmenter.

    Attributes:
        classes: the segmenter's, background first.
        place: of each of the archive's classes among them, background first.
    """

    classes: tuple[str, ...]
    place: tuple[int, ...]

    @classmethod
    def joined(cls, known: Sequence[str], archive: Sequence[str]) -> Relabeling:
        """The known classes, and those of the archive that they lack behind them.

        Raises:
            ConfigError: the two have different names for the background.
        """
        if known[0] != archive[0]:
            raise ConfigError(
                f"class 0 is {archive[0]!r} in the archive and {known[0]!r} in the segmenter; both must be background"
            )
        classes = (*known, *(name for name in archive if name not in known))
        return cls(classes, tuple(classes.index(name) for name in archive))

    def batch(self, batch: Batch) -> Batch:
        """The batch in the segmenter's classes; those that the archive lacks are unknown in each of its cases."""
        views = {name: [self._view(view) for view in many] for name, many in batch.views.items()}
        return replace(batch, views=views)

    def _view(self, view: View) -> View:
        if view.label_BDHW is None:
            return view
        label_BDHW = view.label_BDHW
        table = torch.full((UNKNOWN_LABEL + 1,), UNKNOWN_LABEL, dtype=torch.uint8, device=label_BDHW.device)
        table[: len(self.place)] = torch.tensor(self.place, dtype=torch.uint8, device=label_BDHW.device)
        there_BK = view.known_classes_BK
        if there_BK is None:
            there_BK = label_BDHW.new_ones((len(label_BDHW), len(self.place)), dtype=torch.bool)
        known_BK = there_BK.new_zeros((len(there_BK), len(self.classes)))
        known_BK[:, list(self.place)] = there_BK
        return replace(view, label_BDHW=table[label_BDHW.long()], known_classes_BK=known_BK)
