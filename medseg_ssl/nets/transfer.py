"""What of one set of weights fits another: matching by name and shape, stem adaptation, the audit."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medseg_ssl.config import UserError
from medseg_ssl.nets.compute import at_crop
from medseg_ssl.nets.encoders.base import Encoder
from medseg_ssl.types import Triple


@dataclass(frozen=True)
class Audit:
    """What a load took from a file, by parameter name.

    Attributes:
        path: the file.
        matched: taken as they are.
        adapted: taken after adapting the input channels, with both channel numbers.
        mismatched: in both, with shapes that differ (file and here); left as initialised.
        missing: wanted here, not in the file; left as initialised.
        unexpected: in the file, not wanted here.
        coverage: share of the encoder's parameters taken.
        decoder_coverage: share of the decoder's, None where no decoder was loaded.
        compute: share of the encoder's multiply-adds that the taken weights do, at ``crop_size``; None uncounted.
        crop_size: voxels (D, H, W) at which they were counted.
        note: why no decoder was loaded, where one was offered, and what the file's objective left untrained.
        fresh: beginnings of the names of parameters that nothing has trained: missing, of another shape, or said to be
            untrained by the file.
    """

    path: Path
    matched: tuple[str, ...]
    adapted: dict[str, str]
    mismatched: dict[str, str]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    coverage: float
    decoder_coverage: float | None = None
    compute: float | None = None
    crop_size: Triple | None = None
    note: str = ""
    fresh: tuple[str, ...] = ()
    parameters: dict[str, int] = field(default_factory=dict, repr=False)

    def __str__(self) -> str:
        """The shares, then every tensor by name; ``encoder.stages.2.*`` stands for all that begin so."""
        lines = [f"{self.path.name}: {self.coverage:.1%} of the encoder's parameters taken"]
        if self.decoder_coverage is not None:
            lines[0] += f", {self.decoder_coverage:.1%} of the decoder's"
        if self.compute is not None and self.crop_size is not None:
            lines[0] += (
                f"; {self.compute:.1%} of the encoder's multiply-adds "
                f"(at {' x '.join(map(str, self.crop_size))} voxels)"
            )
        known = {*self.matched, *self.adapted, *self.mismatched, *self.missing, *self.unexpected}
        for title, names in (
            ("matched", grouped(self.matched, known)),
            ("adapted", [f"{name} {how}" for name, how in self.adapted.items()]),
            ("shapes differ", [f"{name} {how}" for name, how in self.mismatched.items()]),
            ("not in the file", grouped(self.missing, known)),
            ("not used", grouped(self.unexpected, known)),
        ):
            if names:
                lines.append(f"  {title}: {', '.join(names)}")
        return "\n".join([*lines, f"  {self.note}"] if self.note else lines)


def grouped(names: Collection[str], known: Collection[str]) -> list[str]:
    """Names, with ``a.b.* (5 tensors)`` for those of ``a.b`` where none of the known names of ``a.b`` is left out."""
    wanted = set(names)
    return _grouped(tuple(dict.fromkeys(names)), [n for n in known if n not in wanted], depth=1)


def _grouped(names: Iterable[str], others: Collection[str], *, depth: int) -> list[str]:
    families: dict[str, list[str]] = {}
    for name in names:
        families.setdefault(".".join(name.split(".")[:depth]), []).append(name)
    out = []
    for prefix, members in families.items():
        left_out = [n for n in others if n.startswith(f"{prefix}.")]
        if len(members) == 1:
            out += members
        elif left_out:
            out += _grouped(members, left_out, depth=depth + 1)
        else:
            out.append(f"{prefix}.* ({len(members)} tensors)")
    return out


def beginnings(names: Collection[str], known: Collection[str]) -> tuple[str, ...]:
    """The shortest beginnings, whole parts up to a dot, that all of these names have and no other known name has."""
    wanted = set(names)
    others = [name for name in known if name not in wanted]
    out: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        heads = [f"{'.'.join(parts[:depth])}." for depth in range(1, len(parts))]
        out[next((h for h in heads if not any(o.startswith(h) for o in others)), name)] = None
    return tuple(out)


def compute_share(encoder: Encoder, taken: Collection[str], crop_size: Triple | None) -> tuple[float, Triple]:
    """Share of an encoder's multiply-adds that weights from a file do, and the crop at which it was counted.

    Args:
        encoder: a copy of it runs on the meta device, which costs no arithmetic.
        taken: names of the parameters that came from the file, without ``encoder.``.
        crop_size: voxels (D, H, W); None takes 64. An axis that is too short for the coarsest level is lengthened.
    """
    coarsest = encoder.strides[-1]
    d, h, w = (max(n, 2 * s) for n, s in zip(crop_size or (64, 64, 64), coarsest, strict=True))
    costs = at_crop(encoder, encoder.channels_in, (d, h, w))
    done = sum(cost for name, cost in costs.items() if name in taken)
    return done / max(1, sum(costs.values())), (d, h, w)


def fill(
    path: Path,
    tensors: dict[str, Tensor],
    *,
    encoder: Encoder,
    decoder: nn.Module | None = None,
    minimum_coverage: float,
    crop_size: Triple | None,
    own: Sequence[int | None] = (),
) -> Audit:
    """Copy a file's tensors into modules, or change nothing at all.

    Args:
        path: the file, for messages.
        tensors: ``encoder.*`` and ``decoder.*``, by our names.
        encoder: takes the former.
        decoder: takes the latter; None leaves them.
        minimum_coverage: smallest share of the parameters of each module that must be found.
        crop_size: voxels (D, H, W) at which multiply-adds are counted, see ``compute_share``.
        own: see ``adapt_stem``.

    Raises:
        UserError: too low a coverage.
    """
    audit, taken = plan(path, "encoder", encoder, tensors, own=own)
    check_coverage(audit, "encoder", audit.coverage, minimum_coverage)
    compute, counted_at = compute_share(encoder, {name.removeprefix("encoder.") for name in taken}, crop_size)
    audit = changed(audit, compute=compute, crop_size=counted_at)
    here = {f"encoder.{n}": p for n, p in encoder.state_dict(keep_vars=True).items()}
    if decoder is not None:
        other, more = plan(path, "decoder", decoder, tensors)
        check_coverage(other, "decoder", other.coverage, minimum_coverage)
        audit, taken = joined(audit, other), taken | more
        here |= {f"decoder.{n}": p for n, p in decoder.state_dict(keep_vars=True).items()}
    with torch.no_grad():
        for name, value in taken.items():
            here[name].copy_(value)
    return audit


def plan(
    path: Path,
    part: str,
    module: nn.Module,
    tensors: dict[str, Tensor],
    *,
    own: Sequence[int | None] = (),
) -> tuple[Audit, dict[str, Tensor]]:
    """Match a module's parameters with a file's tensors by name and shape, without changing either.

    Args:
        path: the file, for messages.
        part: prefix of the module's tensors in the file.
        module: the target; an encoder's stems are adapted to its channels.
        tensors: all tensors of the file.
        own: see ``adapt_stem``; given, every stem is adapted.

    Returns:
        The audit of this part, and the tensors to copy by name.
    """
    wanted = {f"{part}.{name}": value for name, value in module.state_dict().items()}
    stems = {f"{part}.{name}" for name in module.stems} if isinstance(module, Encoder) else set()
    adapted: dict[str, str] = {}
    mismatched: dict[str, str] = {}
    taken: dict[str, Tensor] = {}
    for name, here in wanted.items():
        there = tensors.get(name)
        if there is None:
            continue
        if there.shape == here.shape and not (own and name in stems):
            taken[name] = there
        elif name in stems and there.shape[:1] + there.shape[2:] == here.shape[:1] + here.shape[2:]:
            taken[name] = adapt_stem(there, here.shape[1], own)
            adapted[name] = f"from {there.shape[1]} to {here.shape[1]} channels"
            if own:
                kept = sum(place is not None for place in own)
                adapted[name] += f", {kept} with the weights of their own modality"
        else:
            mismatched[name] = f"{tuple(there.shape)} in the file, {tuple(here.shape)} here"
    counts = {name: value.numel() for name, value in wanted.items()}
    audit = Audit(
        path=path,
        matched=tuple(n for n in taken if n not in adapted),
        adapted=adapted,
        mismatched=mismatched,
        missing=tuple(n for n in wanted if n not in tensors),
        unexpected=tuple(n for n in sorted(tensors) if n.startswith(f"{part}.") and n not in wanted),
        coverage=sum(counts[n] for n in taken) / max(1, sum(counts.values())),
        parameters=counts,
    )
    return audit, taken


def adapt_stem(weight: Tensor, channels_in: int, own: Sequence[int | None] = ()) -> Tensor:
    """Give a stem's weight (O, C, …) another number, or another order, of input channels.

    1 → N repeats the kernel and divides by N; N → 1 sums; N → M does both. An input whose channels are all
    equal gets the same answer before and after.

    Args:
        weight: of the file.
        channels_in: channels here.
        own: for each channel here, the file's channel of the same modality, whose kernel it takes as it is; None takes
            the mean kernel. Empty where modalities decide nothing.
    """
    if own:
        mean = weight.mean(dim=1)
        return torch.stack([mean if place is None else weight[:, place] for place in own], dim=1)
    total = weight.sum(dim=1, keepdim=True)
    return total.repeat(1, channels_in, *(1 for _ in weight.shape[2:])) / channels_in


def check_coverage(audit: Audit, part: str, coverage: float, minimum: float) -> None:
    """Refuse a load that covers too little.

    Raises:
        UserError: names the share, the counts and the largest parameters that did not fit.
    """
    if coverage >= minimum:
        return
    bad = [*audit.mismatched, *audit.missing]
    worst = sorted(bad, key=lambda n: -audit.parameters[n])[:3]
    named = "; ".join(f"{n} ({audit.mismatched.get(n, 'not in the file')})" for n in worst)
    total = sum(audit.parameters.values())
    raise UserError(
        f"{audit.path} covers {coverage:.1%} of this {part}'s {total:,} parameters, below "
        f"the minimum of {minimum:.0%}: {len(audit.mismatched)} tensors with another shape, "
        f"{len(audit.missing)} missing, {len(audit.unexpected)} unused; largest: {named}"
    )


def changed(audit: Audit, **changes: Any) -> Audit:
    """The audit with some fields replaced."""
    return replace(audit, **changes)


def joined(encoder: Audit, decoder: Audit) -> Audit:
    """One audit of an encoder's and a decoder's."""
    return changed(
        encoder,
        matched=encoder.matched + decoder.matched,
        mismatched=encoder.mismatched | decoder.mismatched,
        missing=encoder.missing + decoder.missing,
        unexpected=encoder.unexpected + decoder.unexpected,
        decoder_coverage=decoder.coverage,
        parameters=encoder.parameters | decoder.parameters,
    )
