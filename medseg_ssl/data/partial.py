"""What a run may know of an archive: other splits or cases than its own, labels of which only a part is annotated.

Nothing is written: ``Archive.limited`` hands out a copy that reads this way. A class that counts as unstated in a case
becomes background in its label and False in its ``known_classes``, so that the losses merge it into the background; a
slice that counts as unlabeled becomes ``UNKNOWN_LABEL``, which enters no loss and attracts no crop.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from pydantic import Field

from medseg_ssl import draws
from medseg_ssl.data.manifest import CaseRow, Row, Split
from medseg_ssl.types import UNKNOWN_LABEL, Triple


class PartialLabel(Row):
    """The part of a case's label that counts as annotated.

    Attributes:
        classes: names of the stated foreground classes; None: those that the case states.
        slices: labeled axial slices (D) of the label's own grid, ascending; None: all of them.
    """

    classes: tuple[str, ...] | None = None
    slices: tuple[int, ...] | None = None


class Access(Row):
    """What a run may use beside, or instead of, what the archive itself says; picklable.

    Attributes:
        splits: in place of those of the same name in the archive.
        labels: case to the part of its label that is known.
        channels: modalities of a case in channel order, for cases of several (see ``channels.cases_of``); empty leaves
            the cases as they are.
    """

    splits: tuple[Split, ...] = ()
    labels: dict[str, PartialLabel] = Field(default_factory=dict)
    channels: tuple[str, ...] = ()

    def identity(self) -> dict[str, str]:
        """Short hashes of what there is, for the inputs of a run folder; empty where there is nothing."""
        parts = {"splits": [split.model_dump_json() for split in self.splits]}
        parts["labels"] = [f"{case}:{part.model_dump_json()}" for case, part in sorted(self.labels.items())]
        parts["channels"] = list(self.channels)
        return {
            key: hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
            for key, lines in parts.items()
            if lines
        }


def limited_cases(
    cases: Mapping[str, CaseRow], classes: Sequence[str], access: Access
) -> Mapping[str, CaseRow]:
    """The rows with ``known_classes`` as the partial labels leave them; an unstated class stays unstated."""
    rows = {}
    for case, part in access.labels.items():
        if part.classes is not None:
            known = cases[case].known_classes or (True,) * len(classes)
            stated = (True, *(known[k] and name in part.classes for k, name in enumerate(classes) if k))
            rows[case] = cases[case].model_copy(update={"known_classes": stated})
    return {**cases, **rows} if rows else cases


def limit_label(
    label_DHW: np.ndarray, part: PartialLabel, *, classes: Sequence[str], row_4: np.ndarray, start: Triple
) -> np.ndarray:
    """A box of a label with what nobody annotated taken out.

    Args:
        label_DHW: uint8.
        part: what is annotated.
        classes: of the archive, background first.
        row_4: takes an index (D, H, W, 1) of this grid to the slice of the label's own grid.
        start: of the box on this grid.
    """
    label_DHW = label_DHW.copy()
    if part.classes is not None:
        table = np.arange(256, dtype=np.uint8)
        table[[k for k, name in enumerate(classes) if k and name not in part.classes]] = 0
        label_DHW = table[label_DHW]
    if part.slices is not None:
        d, h, w = (
            np.arange(first, first + size, dtype=np.float64)
            for first, size in zip(start, label_DHW.shape, strict=True)
        )
        place_DHW = row_4[3] + row_4[0] * d[:, None, None] + row_4[1] * h[:, None] + row_4[2] * w
        # a voxel belongs to the slice whose centre is nearest; halves go up, wherever the box begins
        labeled_DHW = np.isin(np.floor(place_DHW + 0.5), part.slices)
        label_DHW[~labeled_DHW] = UNKNOWN_LABEL
    return label_DHW


# -- drawing -------------------------------------------------------------------------------------------------


def draw_classes(
    stated: Mapping[str, Sequence[str]], *, count: int, seed: int, draw: int
) -> dict[str, tuple[str, ...]]:
    """Choose the stated classes of every case: those that were chosen least so far, ties at random.

    A case's choice depends on the cases before it alone, so a smaller budget is the start of a larger one.

    Args:
        stated: case, by its content and in the order of the draw, to the foreground classes its annotator stated.
        count: classes to keep of each; a case that states fewer keeps them all.
        seed: of the comparison.
        draw: number of the draw.
    """
    chosen: dict[str, tuple[str, ...]] = {}
    dealt: Counter[str] = Counter()
    for case, names in stated.items():
        generator = draws.numpy_generator(seed, draw, f"stated classes/{case}")
        order = [names[int(i)] for i in generator.permutation(len(names))]
        kept = sorted(order, key=lambda name: dealt[name])[:count]
        dealt.update(kept)
        chosen[case] = tuple(name for name in names if name in kept)
    return chosen


def draw_slices(
    case: str,
    *,
    shape_d: int,
    shown: Sequence[int],
    share: float,
    spread: Literal["random", "even"],
    seed: int,
    draw: int,
) -> tuple[int, ...]:
    """Choose the labeled axial slices of a case: a share of all of them, one at least, ascending.

    An annotator opens a case where there is something to draw: one chosen slice shows a class, where any does.

    Args:
        case: by its content.
        shape_d: axial slices there are.
        shown: those that show a class.
        share: of the slices.
        spread: drawn ``random``, or ``even`` at equal distances from a drawn start.
        seed: of the comparison.
        draw: number of the draw.
    """
    generator = draws.numpy_generator(seed, draw, f"labeled slices/{case}")
    count = min(shape_d, max(1, round(share * shape_d)))
    if spread == "random":
        order = generator.permutation(shape_d).tolist()
        first = next((place for place in order if place in set(shown)), order[0])
        return tuple(sorted([first, *(place for place in order if place != first)][:count]))
    chosen = np.floor((np.arange(count) + generator.random()) * shape_d / count).astype(int)
    if len(shown) and not set(chosen.tolist()) & set(shown):
        wanted = int(generator.choice(np.asarray(shown)))
        chosen[np.abs(chosen - wanted).argmin()] = wanted
    return tuple(sorted(chosen.tolist()))
