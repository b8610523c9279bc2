"""The contract of an import: a file that another project wrote in, weights by our names out.

Adding one is one file with one final class, and one test that compares features with the other project's network.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from medseg_ssl.config import Block, Record, UserError
from medseg_ssl.nets.decoders.base import Decoder
from medseg_ssl.nets.encoders.base import Encoder
from medseg_ssl.nets.transfer import Audit, changed, fill
from medseg_ssl.types import Triple, TripleMm

ENCODERS = "medseg_ssl.nets.encoders"
DECODERS = "medseg_ssl.nets.decoders"


class ImportConfig(Record):
    """Options every import has (none); each file's ``Config`` adds what its format leaves open."""


@dataclass(frozen=True)
class Foreign:
    """What a foreign file holds, in our words.

    Attributes:
        encoder: ``{name, …options}`` of the encoder on our shelf that has its topology.
        tensors: its weights by our names, ``encoder.*`` and ``decoder.*``.
        channels_in: channels of its input.
        decoder: likewise, None where the file has none or none that we have.
        unused: names in the file, by the other project, that have no place here.
        format: what it is, for the card's ``source``.
        licence: where the format or the file says it.
        notes: what a user should know, a line each.
        spacing_mm: voxel size (D, H, W) of its training crops, None where unknown or several.
        crop_size: voxels (D, H, W) of them.
        modalities: seen in training, as far as the file says.
    """

    encoder: dict[str, Any]
    tensors: dict[str, Tensor]
    channels_in: int
    decoder: dict[str, Any] | None = None
    unused: tuple[str, ...] = ()
    format: str = ""
    licence: str = ""
    notes: tuple[str, ...] = ()
    spacing_mm: TripleMm | None = None
    crop_size: Triple | None = None
    modalities: tuple[str, ...] = ()


class Import(ABC):
    """Reads one kind of foreign file.

    Subclasses are final, hold a nested ``Config`` (a subclass of ``ImportConfig``) and are built as ``Import(config)``.
    """

    Config: ClassVar[type[ImportConfig]] = ImportConfig

    def __init__(self, config: ImportConfig) -> None:
        self.config = config

    @abstractmethod
    def read(self, path: Path) -> Foreign:
        """Read a file without running anything that it holds.

        Raises:
            UserError: missing, broken or another kind of file, or a network that no encoder here can be.
        """


class Imported(NamedTuple):
    """Modules with the weights of a foreign file."""

    encoder: Encoder
    decoder: Decoder | None
    audit: Audit


def build(path: Path, foreign: Foreign, *, minimum_coverage: float = 0.9) -> Imported:
    """Build the encoder (and decoder) of a foreign file and fill it.

    Weights that the file lacks are drawn with a fixed seed, so that equal files give equal results.

    Args:
        path: the file, for messages.
        foreign: what it holds.
        minimum_coverage: smallest share of the parameters of each part that must be found.

    Raises:
        UserError: the shelf has no such encoder, or too low a coverage.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder, decoder = modules(
            foreign.encoder, foreign.decoder, foreign.channels_in, spacing_mm=foreign.spacing_mm
        )
    tensors = {n: t.float() if t.is_floating_point() else t for n, t in foreign.tensors.items()}
    audit = fill(
        path,
        tensors,
        encoder=encoder,
        decoder=decoder,
        minimum_coverage=minimum_coverage,
        crop_size=foreign.crop_size,
    )
    return Imported(encoder, decoder, changed(audit, unexpected=audit.unexpected + foreign.unused))


def modules(
    encoder: Mapping[str, Any],
    decoder: Mapping[str, Any] | None,
    channels_in: int,
    *,
    spacing_mm: TripleMm | None = None,
) -> tuple[Encoder, Decoder | None]:
    """The modules that blocks name.

    Args:
        encoder: ``{name, …options}``; ``decoder`` likewise.
        decoder: None for none.
        channels_in: channels of the input.
        spacing_mm: voxel size that an encoder which thinks in millimetres was trained at; None where unknown.

    Raises:
        UserError: the shelf has no such module, or it has no such options.
    """
    encoder_class, options = Block.model_validate(encoder).resolve(ENCODERS, Encoder, prefix="encoder")
    pyramid = encoder_class(options.at_spacing(spacing_mm), channels_in)  # pyright: ignore[reportAbstractUsage]
    if decoder is None:
        return pyramid, None
    decoder_class, options = Block.model_validate(decoder).resolve(DECODERS, Decoder, prefix="decoder")
    return pyramid, decoder_class(options, pyramid.channels, pyramid.strides)  # pyright: ignore[reportAbstractUsage]


def parameter_names(encoder: Mapping[str, Any], decoder: Mapping[str, Any] | None = None) -> list[str]:
    """Names of the parameters and buffers of what blocks name, ``encoder.*`` and ``decoder.*``; nothing is computed.

    Raises:
        UserError: as ``modules``.
    """
    with torch.device("meta"):
        pyramid, reader = modules(encoder, decoder, 1)
    own = [f"encoder.{name}" for name in pyramid.state_dict()]
    return own if reader is None else [*own, *(f"decoder.{name}" for name in reader.state_dict())]


def renamed(
    tensors: Mapping[str, Tensor],
    names: Mapping[str, str],
    *,
    derived: Callable[[str], bool] = lambda name: False,
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Tensors by our names, and the foreign names that found no place.

    Args:
        tensors: of the file.
        names: ours to theirs.
        derived: foreign names that repeat others or follow from the topology, such as tables of indices; they are no
            loss and are left out of both.
    """
    found = {ours: tensors[theirs] for ours, theirs in names.items() if theirs in tensors}
    used = set(names.values())
    return found, tuple(n for n in tensors if n not in used and not derived(n))


def state_dict(content: Any, path: Path, *, at: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """The tensors by name in what a file held, without the prefixes that wrappers for training put before them.

    Args:
        content: of the file.
        path: for messages.
        at: keys under which the weights may lie, tried in order; none of them there, the content itself is taken.

    Raises:
        UserError: no mapping with tensors.
    """
    inner = content
    if isinstance(content, Mapping):
        inner = next((content[key] for key in at if isinstance(content.get(key), Mapping)), content)
    if not isinstance(inner, Mapping):
        raise UserError(f"{path} holds a {type(inner).__name__}, not tensors by name")
    tensors = {str(name): value for name, value in inner.items() if isinstance(value, Tensor)}
    if not tensors:
        keys = ", ".join(map(str, list(inner)[:5])) or "nothing"
        raise UserError(f"{path} holds no tensors by name; it holds {keys}")
    for prefix in ("module.", "_orig_mod."):
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors
