"""Batches of two loaders as one: micro-batch by micro-batch, the samples of the first, then those of the second."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from medseg_ssl.types import Batch, View

BEHIND = 1 << 40
"""Added to the global sample indices of the second loader: no two samples of a run share their random draws."""


def joined(first: Iterable[Batch], second: Iterable[Batch]) -> Iterator[Batch]:
    """The batches of two loaders of equal length, each two as one.

    Args:
        first: gives seed and order.
        second: with the views of the first, and as many classes in their labels.
    """
    for one, other in zip(first, second, strict=True):
        yield Batch(
            views={
                name: [_view(a, b) for a, b in zip(many, other.views[name], strict=True)]
                for name, many in one.views.items()
            },
            subject_B=one.subject_B + other.subject_B,
            relation_B=one.relation_B + other.relation_B,
            sample_index_B=torch.cat([one.sample_index_B, other.sample_index_B + BEHIND]),
            seed=one.seed,
            scans_B=one.scans_B + other.scans_B,
        )


def _view(a: View, b: View) -> View:
    return View(
        image_BCDHW=torch.cat([a.image_BCDHW, b.image_BCDHW]),
        valid_BDHW=torch.cat([a.valid_BDHW, b.valid_BDHW]),
        foreground_BDHW=torch.cat([a.foreground_BDHW, b.foreground_BDHW]),
        affine_B44=torch.cat([a.affine_B44, b.affine_B44]),
        spacing_mm_B3=torch.cat([a.spacing_mm_B3, b.spacing_mm_B3]),
        modality_B=a.modality_B + b.modality_B,
        clean_BCDHW=_both(a.clean_BCDHW, b.clean_BCDHW),
        label_BDHW=_both(a.label_BDHW, b.label_BDHW),
        known_classes_BK=_both(a.known_classes_BK, b.known_classes_BK),
    )


def _both(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return None if a is None or b is None else torch.cat([a, b])
