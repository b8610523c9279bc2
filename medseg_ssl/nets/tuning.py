"""Which parameters of an encoder are trained: none, those that see the image, or those of its norms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import nn

from medseg_ssl.nets.encoders.base import Encoder

Part = Literal["frozen", "stem", "norm"]


def train_part(encoder: Encoder, part: Part, *, fresh: tuple[str, ...] = ()) -> None:
    """Leave a gradient to one part of an encoder alone, and to what nothing has trained yet.

    Args:
        encoder: its parameters are marked.
        part: ``frozen`` none; ``stem`` the layers that see the image; ``norm`` scales and shifts of its norms (Frankle
            et al., arXiv 2003.00152).
        fresh: beginnings of the names of parameters that a loaded file has not trained.

    Raises:
        ValueError: the encoder has no such parameter.
    """
    names = PARTS[part](encoder)
    if part != "frozen" and not names:
        raise ValueError(f"{type(encoder).__name__} has no parameters of this part: {part}")
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_(name in names or name.startswith(fresh))


def stem_parameters(encoder: Encoder) -> set[str]:
    """Every parameter of the layers that see the image, by name: ``Encoder.stems`` and their biases."""
    layers = {name.rpartition(".")[0] for name in encoder.stems}
    return {name for name, _ in encoder.named_parameters() if name.rpartition(".")[0] in layers}


def norm_parameters(module: nn.Module) -> set[str]:
    """Scales and shifts of the norms below a module, by name; the classes of ours, torch's and timm's say Norm."""
    return {
        f"{prefix}.{name}".lstrip(".")
        for prefix, layer in module.named_modules()
        if "Norm" in type(layer).__name__
        for name, _ in layer.named_parameters(recurse=False)
    }


PARTS: dict[Part, Callable[[Encoder], set[str]]] = {
    "frozen": lambda encoder: set(),
    "stem": stem_parameters,
    "norm": norm_parameters,
}


def rest_frozen(module: nn.Module) -> None:
    """Put parts without a trainable parameter into eval mode: no dropout, and batch norms keep their statistics."""
    parameters = [*module.parameters()]
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        module.eval()
        return
    for child in module.children():
        rest_frozen(child)
