"""The segmenter of a fine-tuning run: its heads, its card, and how evaluations see it on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from medseg_ssl import __version__

if TYPE_CHECKING:
    from medseg_ssl.data.archive import Archive
    from medseg_ssl.nets.encoder_file import Card
    from medseg_ssl.objectives.base import Objective
    from medseg_ssl.types import TripleMm

    from .settings import FinetuneConfig


def heads(head: Any) -> Any:
    """A segmenter file's list of heads, from the one that segments."""
    from torch import nn

    return head if isinstance(head, nn.ModuleList) else nn.ModuleList([head])


def never_trained(unread: Sequence[str], random: Sequence[str]) -> tuple[str, ...]:
    """Beginnings of names of the encoder's parameters that this run does not train and no file did.

    Args:
        unread: beginnings of those that the loss does not reach (``Exported.untrained``).
        random: beginnings of those that were random when the run began; ``("",)`` for all.
    """
    inside = [name for name in unread if any(name.startswith(other) for other in random)]
    around = [name for name in random if any(name.startswith(other) for other in unread)]
    return tuple(dict.fromkeys([*inside, *around]))


def make_card(
    config: FinetuneConfig,
    archive: Archive,
    views: Mapping[str, Any],
    cases: Sequence[str],
    *,
    silent: tuple[str, ...],
    steps: int,
    earlier: Card | None = None,
) -> Card:
    """The card of the segmenter that this run ships; scans that an ``earlier`` one knew stay readable."""
    from medseg_ssl.nets.encoder_file import Card

    assert config.encoder is not None
    first = next(iter(views.values()))
    scans = [archive.scans[key] for key in archive.cases[cases[0]].scans]
    # of chosen modalities it knows no others: what it is not made for is not scored with it
    known = config.data.modalities or tuple(archive.intensity)
    others: set[str] = set()
    if len(scans) == 1:
        others = {archive.scans[archive.cases[case].scans[0]].modality for case in cases}
        others |= set() if earlier is None else {*earlier.modalities, *earlier.other_modalities}
    return Card(
        kind="segmenter",
        encoder=config.encoder.model_dump(mode="json"),
        decoder=config.decoder.model_dump(mode="json"),
        channels_in=len(scans),
        classes=archive.classes,
        silent_classes=silent,
        spacing_mm=first.spacing_mm or common_spacing(archive),
        crop_size=first.size,
        mirror_axes=first.mirror_axes,
        intensity=({} if earlier is None else earlier.intensity)
        | {
            name: policy.model_dump(mode="json")
            for name, policy in archive.intensity.items()
            if name in known
        },
        modalities=tuple(row.modality for row in scans),
        other_modalities=tuple(sorted(others - {scans[0].modality})),
        archive_fingerprint=archive.fingerprint,
        code_version=__version__,
        objective=config.objective.name,
        steps=steps,
    )


def common_spacing(archive: Archive) -> TripleMm | None:
    """Voxel size (D, H, W) that an archive was resampled to, or that all its labeled scans have; else None."""
    from medseg_ssl.inference.inputs import close_spacing

    labeled = [archive.scans[key].spacing_mm for c in archive.cases.values() if c.labeled for key in c.scans]
    if archive.recipe.spacing_mm is not None or not labeled:
        return archive.recipe.spacing_mm
    return labeled[0] if all(close_spacing(one, labeled[0]) for one in labeled) else None


def predictor(objective: Objective, *, card: Any, machine: Any) -> Any:
    """The objective's networks as an evaluation wants them."""
    from medseg_ssl.inference.predictor import Predictor, largest_stride
    from medseg_ssl.nets.segmenter import Segmenter

    parts, described = objective.export(), card()
    assert parts.decoder is not None
    segmenter = Segmenter(parts.encoder, parts.decoder, len(described.classes), supervised_levels=1)
    segmenter.heads = heads(parts.head)
    stride = largest_stride(parts.encoder.strides)
    return Predictor(segmenter, described, device=str(machine.device), stride=stride)
