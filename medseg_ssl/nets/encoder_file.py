"""Encoder files: weights as safetensors with a card that says what they are, and an audited load.

Tensors are named ``encoder.*``, ``decoder.*`` (where the objective trained one) and ``head.*`` (a segmenter's
heads). The card is JSON in the file's metadata. Nothing here unpickles.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from medseg_ssl.config import Block, UserError
from medseg_ssl.nets.decoders.base import Decoder
from medseg_ssl.nets.encoders.base import Encoder
from medseg_ssl.nets.segmenter import Segmenter
from medseg_ssl.nets.transfer import Audit, changed, fill
from medseg_ssl.types import Triple, TripleMm

ENCODERS = "medseg_ssl.nets.encoders"
DECODERS = "medseg_ssl.nets.decoders"


class Card(BaseModel):
    """What the weights in a file are; everything that prediction and fine-tuning must know.

    Attributes:
        kind: ``encoder`` (with or without decoder) or ``segmenter`` (with decoder and heads).
        encoder: ``{name, …config}`` of the encoder; ``decoder`` likewise, None without one.
        channels_in: channels of the input.
        classes: class names, background first; empty for an encoder.
        silent_classes: those among them that no training case stated; the segmenter never predicts them.
        spacing_mm: voxel size (D, H, W) of the training crops; None where the archive had several.
        crop_size: voxels (D, H, W) of the training crops.
        mirror_axes: axes that were mirrored at random in training.
        intensity: intensity policy by modality.
        modalities: modality of each input channel for a segmenter, modalities seen for an encoder.
        other_modalities: of a segmenter of one channel, what else its training cases were scanned with.
        archives: fingerprints of the archives whose scans were trained on, where they are several or only some of their
            modalities were; empty where ``archive_fingerprint`` says all.
        checked_against: protected scans that no training scan repeats, one entry per archive (``data/leakage.py``).
        untrained: beginnings of the names of the encoder's parameters that the objective did not train.
        chosen_by: where the weights are the best evaluated ones, not the last: score, value, subset, step, candidates.
        chosen_before: how weights that fine-tuning began with were chosen, with the ``archives`` it was done on.
        source: where imported weights come from; ``licence`` theirs, or that of the training data's use.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["encoder", "segmenter"] = "encoder"
    encoder: dict[str, Any]
    decoder: dict[str, Any] | None = None
    channels_in: int = 1
    classes: tuple[str, ...] = ()
    silent_classes: tuple[str, ...] = ()
    spacing_mm: TripleMm | None = None
    crop_size: Triple | None = None
    mirror_axes: tuple[int, ...] = ()
    intensity: dict[str, dict[str, Any]] = {}
    modalities: tuple[str, ...] = ()
    other_modalities: tuple[str, ...] = ()
    archive_fingerprint: str = ""
    archives: tuple[str, ...] = ()
    code_version: str = ""
    objective: str = ""
    steps: int = 0
    checked_against: tuple[dict[str, Any], ...] = ()
    untrained: tuple[str, ...] = ()
    chosen_by: dict[str, Any] | None = None
    chosen_before: tuple[dict[str, Any], ...] = ()
    licence: str = ""
    source: str = ""


class Loaded(NamedTuple):
    """Modules built from a file; ``head`` holds a segmenter's heads."""

    encoder: Encoder
    decoder: Decoder | None
    head: nn.Module | None
    card: Card

    def segmenter(self) -> Segmenter:
        """The segmenter of a file of that kind.

        Raises:
            UserError: the file holds no segmenter.
        """
        if self.decoder is None or not isinstance(self.head, nn.ModuleList):
            raise UserError("the file holds an encoder, not a segmenter; fine-tune it first")
        built = Segmenter(
            self.encoder, self.decoder, len(self.card.classes), supervised_levels=len(self.head)
        )
        built.heads = self.head
        return built


def block_of(module: Encoder | Decoder) -> dict[str, Any]:
    """The ``{name, …config}`` block that builds a module from the shelf."""
    return {"name": type(module).__module__.rsplit(".", 1)[-1], **module.config.model_dump(mode="json")}


# -- writing -----------------------------------------------------------------------------------------------


def save(
    path: Path, *, encoder: Encoder, card: Card, decoder: Decoder | None = None, head: nn.Module | None = None
) -> Path:
    """Write an encoder file; a file that was there stays whole until the new one is complete.

    The card's ``encoder``, ``decoder`` and ``channels_in`` are taken from the modules, so they cannot
    disagree.

    Raises:
        UserError: the weights are not finite, or the disk is full or not writable.
    """
    from safetensors.torch import save as to_bytes

    path = Path(path)
    tensors: dict[str, Tensor] = {}
    for part, module in (("encoder", encoder), ("decoder", decoder), ("head", head)):
        for name, value in ({} if module is None else module.state_dict()).items():
            tensors[f"{part}.{name}"] = value.detach().cpu().contiguous()
    broken = _not_finite(tensors)
    if broken:
        raise UserError(f"did not write {path}: {broken} holds values that are not finite")
    card = card.model_copy(
        update={
            "encoder": block_of(encoder),
            "decoder": None if decoder is None else block_of(decoder),
            "channels_in": encoder.channels_in,
        }
    )
    # one key only: safetensors writes several in random order, and equal weights should give equal files
    write_atomically(path, to_bytes(tensors, {"card": card.model_dump_json()}))
    return path


def write_atomically(path: Path, content: bytes) -> None:
    """Write a whole file or none; one that was there stays until the new one is complete.

    Raises:
        UserError: the disk is full or not writable.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes 0600; a shipped file follows the user's umask
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; nothing was overwritten") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _not_finite(tensors: dict[str, Tensor]) -> str | None:
    return next((n for n, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()), None)


# -- reading -----------------------------------------------------------------------------------------------


def load_card(path: Path) -> Card:
    """Read the card alone.

    Raises:
        UserError: missing or broken file, or one without a card.
    """
    return _read(path, weights=False)[0]


def _read(path: Path, *, weights: bool = True) -> tuple[Card, dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise UserError(f"no encoder file at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()} if weights else {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path} is no readable safetensors file (truncated, or another format): {reason}"
        ) from error
    if "card" not in metadata:
        raise UserError(f"{path} holds no card; only files that this suite wrote (or imported) can be loaded")
    try:
        card = Card.model_validate(json.loads(metadata["card"]))
    except (ValidationError, json.JSONDecodeError) as error:
        raise UserError(f"the card in {path} cannot be read: {' '.join(str(error).split())[:200]}") from error
    broken = _not_finite(tensors)
    if broken:
        raise UserError(f"{path}: {broken} holds values that are not finite")
    return card, tensors


def _encoder_of(card: Card, path: Path) -> Encoder:
    try:
        cls, config = Block.model_validate(card.encoder).resolve(ENCODERS, Encoder, prefix="encoder")
    except UserError as error:
        raise UserError(f"{path}: cannot build its encoder: {error}") from error
    return cls(config, card.channels_in)  # pyright: ignore[reportAbstractUsage]


def _decoder_of(card: Card, encoder: Encoder, path: Path) -> Decoder | None:
    if card.decoder is None:
        return None
    try:
        cls, config = Block.model_validate(card.decoder).resolve(DECODERS, Decoder, prefix="decoder")
    except UserError as error:
        raise UserError(f"{path}: cannot build its decoder: {error}") from error
    return cls(config, encoder.channels, encoder.strides)  # pyright: ignore[reportAbstractUsage]


def build(path: Path) -> Loaded:
    """Build the modules of a file as its card says, with exactly its weights.

    Raises:
        UserError: missing or broken file, or weights that do not fit the card.
    """
    path = Path(path)
    card, tensors = _read(path)
    encoder = _encoder_of(card, path)
    decoder = _decoder_of(card, encoder, path)
    head: nn.Module | None = None
    if card.kind == "segmenter":
        if decoder is None:
            raise UserError(f"{path}: its card says segmenter but names no decoder")
        levels = len({name.split(".")[1] for name in tensors if name.startswith("head.")})
        if not 1 <= levels <= len(decoder.channels_out):
            raise UserError(f"{path}: a segmenter with {levels} heads for {len(decoder.channels_out)} levels")
        head = Segmenter(encoder, decoder, len(card.classes), supervised_levels=levels).heads
    for part, module in (("encoder", encoder), ("decoder", decoder), ("head", head)):
        if module is None:
            continue
        own = {n.removeprefix(f"{part}."): t for n, t in tensors.items() if n.startswith(f"{part}.")}
        try:
            module.load_state_dict(own)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{path}: the {part}'s weights do not fit its card: {reason}") from error
    return Loaded(encoder, decoder, head, card)


def load_into(
    path: Path,
    *,
    encoder: Encoder,
    decoder: Decoder | None = None,
    minimum_coverage: float = 0.9,
    allow_decoder: bool = True,
    modalities: Sequence[str] = (),
) -> Audit:
    """Copy a file's weights into modules that exist, or change nothing at all.

    The stem is adapted between channel numbers so that the answer to equal channels stays the same: its
    weight is summed over the file's channels, repeated over the target's and divided by their number. So an encoder
    that was pretrained on one scan at a time enters a target of several channels. Of a segmenter, whose channels have
    modalities, every channel takes the weights of its own one.

    Args:
        path: the encoder file.
        encoder: takes ``encoder.*``.
        decoder: takes ``decoder.*`` where the file has one and ``allow_decoder`` is True; otherwise it stays
            as initialised and the audit's note says why.
        minimum_coverage: smallest share of the parameters of each loaded module that must be found.
        allow_decoder: False leaves the decoder alone.
        modalities: of the encoder's input channels; without them channels go by their number.

    Raises:
        UserError: broken file, another kind of encoder, other strides, or too low a coverage; the message
            names the largest parameters that did not fit.
    """
    path = Path(path)
    card, tensors = _read(path)
    _check_topology(card, encoder, path)
    takes_decoder = decoder is not None and allow_decoder and card.decoder is not None
    audit = fill(
        path,
        tensors,
        encoder=encoder,
        decoder=decoder if takes_decoder else None,
        minimum_coverage=minimum_coverage,
        crop_size=card.crop_size,
        own=_own_channels(card, modalities),
    )
    parts = ("head.",) if takes_decoder else ("decoder.", "head.")
    audit = changed(
        audit, unexpected=audit.unexpected + tuple(n for n in sorted(tensors) if n.startswith(parts))
    )
    notes = []
    here = block_of(encoder)
    different = [
        f"{k} {card.encoder.get(k)} there, {v} here" for k, v in here.items() if card.encoder.get(k, v) != v
    ]
    if different:  # some options leave no trace in the shapes of weights
        notes.append(f"the encoders' options differ: {'; '.join(different)}")
    if card.untrained:
        notes.append(
            f"not trained in the file: encoder.{', encoder.'.join(f'{name}*' for name in card.untrained)}"
        )
    if decoder is not None and not takes_decoder:
        notes.append(f"decoder not loaded: {'not asked for' if card.decoder else 'the file holds none'}")
    fresh = tuple(f"encoder.{name}" for name in card.untrained) + audit.missing + tuple(audit.mismatched)
    return changed(audit, note="; ".join(notes), fresh=fresh)


def _own_channels(card: Card, modalities: Sequence[str]) -> tuple[int | None, ...]:
    """For each of these channels the file's one of the same modality; empty where both say the same, or one nothing."""
    there = card.modalities
    stated = card.kind == "segmenter" and len(there) == card.channels_in and len(set(there)) == len(there)
    if not stated or not set(there) & set(modalities) or tuple(modalities) == there or len(there) == 1:
        return ()
    return tuple(there.index(name) if name in there else None for name in modalities)


def _check_topology(card: Card, encoder: Encoder, path: Path) -> None:
    here = block_of(encoder)["name"]
    there = card.encoder.get("name")
    if there != here:
        raise UserError(f"{path} holds a {there!r} encoder, this run builds {here!r}")
    if card.encoder == block_of(encoder):
        return
    with torch.random.fork_rng(devices=[]):  # strides leave no trace in the shapes of weights
        strides = _encoder_of(card, path).strides
    if strides != encoder.strides and len(strides) == len(encoder.strides):
        raise UserError(f"{path}: its encoder has strides {strides}, this run's has {encoder.strides}")
