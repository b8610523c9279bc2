"""What of one set of weights fits another: matching by name and shape, stem adaptation, the audit."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from medseg_ssl.config import UserError
from medseg_ssl.nets.encoders.base import Encoder


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
        note: why no decoder was loaded, where one was offered.
    """

    path: Path
    matched: tuple[str, ...]
    adapted: dict[str, str]
    mismatched: dict[str, str]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    coverage: float
    decoder_coverage: float | None = None
    note: str = ""
    parameters: dict[str, int] = field(default_factory=dict, repr=False)

    def __str__(self) -> str:
        """A report of a few lines."""
        lines = [f"{self.path.name}: {self.coverage:.1%} of the encoder's parameters taken"]
        if self.decoder_coverage is not None:
            lines[0] += f", {self.decoder_coverage:.1%} of the decoder's"
        lines.append(f"  matched: {len(self.matched)} tensors")
        lines += [f"  adapted: {name} {how}" for name, how in self.adapted.items()]
        for title, names in (
            ("shapes differ", [f"{n} {how}" for n, how in self.mismatched.items()]),
            ("not in the file", list(self.missing)),
            ("not used", list(self.unexpected)),
        ):
            if names:
                more = f" and {len(names) - 5} more" if len(names) > 5 else ""
                lines.append(f"  {title}: {len(names)} tensors: {', '.join(names[:5])}{more}")
        return "\n".join([*lines, f"  {self.note}"] if self.note else lines)


def plan(
    path: Path, part: str, module: nn.Module, tensors: dict[str, Tensor]
) -> tuple[Audit, dict[str, Tensor]]:
    """Match a module's parameters with a file's tensors by name and shape, without changing either.

    Args:
        path: the file, for messages.
        part: prefix of the module's tensors in the file.
        module: the target; an encoder's stem is adapted to its channels.
        tensors: all tensors of the file.

    Returns:
        The audit of this part, and the tensors to copy by name.
    """
    wanted = {f"{part}.{name}": value for name, value in module.state_dict().items()}
    stem = f"{part}.{module.stem}" if isinstance(module, Encoder) else ""
    adapted: dict[str, str] = {}
    mismatched: dict[str, str] = {}
    taken: dict[str, Tensor] = {}
    for name, here in wanted.items():
        there = tensors.get(name)
        if there is None:
            continue
        if there.shape == here.shape:
            taken[name] = there
        elif name == stem and there.shape[:1] + there.shape[2:] == here.shape[:1] + here.shape[2:]:
            taken[name] = adapt_stem(there, here.shape[1])
            adapted[name] = f"from {there.shape[1]} to {here.shape[1]} channels"
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


def adapt_stem(weight: Tensor, channels_in: int) -> Tensor:
    """Give a stem's weight (O, C, …) another number of input channels.

    1 → N repeats the kernel and divides by N; N → 1 sums; N → M does both. An input whose channels are all
    equal gets the same answer before and after.
    """
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
