"""Which parameters of an encoder a loss reaches: those that the maps it reads depend on."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from medseg_ssl.nets.compute import meta_copy
from medseg_ssl.nets.decoders.base import Decoder
from medseg_ssl.nets.encoders.base import Encoder
from medseg_ssl.nets.transfer import beginnings


def unread(encoder: Encoder, decoder: Decoder | None = None, *, coarsest: bool = False) -> tuple[str, ...]:
    """Beginnings of the names of an encoder's parameters that get no gradient and stay as they were drawn.

    Autograd's graph is asked, on copies without content: nothing is computed, and no random number is drawn. Ask when
    the networks are built, before adapters or a compiler change them.

    Args:
        encoder: of a pyramid.
        decoder: reads the pyramid; the loss reads its finest map. None for none.
        coarsest: the loss reads the encoder's coarsest map too.
    """
    copied = meta_copy(encoder).requires_grad_(True)
    d, h, w = (2 * stride for stride in encoder.strides[-1])
    with torch.enable_grad():
        maps: list[Tensor] = copied(torch.empty(1, encoder.channels_in, d, h, w, device="meta"))
        read = [maps[-1]] if coarsest else []
        if decoder is not None:
            read.append(meta_copy(decoder)(maps)[0])
    reached = {id(parameter) for parameter in _leaves(read)}
    names = [name for name, _ in copied.named_parameters()]
    return beginnings([n for n, p in copied.named_parameters() if id(p) not in reached], names)


def _leaves(outputs: Iterable[Tensor]) -> list[nn.Parameter]:
    """Parameters at the ends of autograd's graph; none of its functions runs."""
    nodes, seen, found = [out.grad_fn for out in outputs], set(), []
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [before for before, _ in node.next_functions]
        if (variable := getattr(node, "variable", None)) is not None:
            found.append(variable)
    return found
