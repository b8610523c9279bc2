"""2D weights of timm, a state dict (``.pth``, ``.safetensors``), lifted to volumes by the ``lifted2d`` encoder.

timm adapts what it loads (channels of the first kernel, learned positions, names of older files), so what came from the
file is found by asking twice: a parameter that answers to a change of the file has come from it.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from medseg_ssl.config import UserError, parse
from medseg_ssl.nets.encoders.lifted2d import Lifted2D, network_2d
from medseg_ssl.nets.imports._files import read
from medseg_ssl.nets.imports.base import Foreign, Import, ImportConfig, state_dict

INSIDE = "network.network."
"""Where the 2D network stands in the encoder."""


class Timm(Import):
    """A 2D network's weights in the ``lifted2d`` encoder; what mixes slices or refines tokens is new."""

    class Config(ImportConfig):
        """What the weights do not tell.

        Attributes:
            model: name in timm of the network that the weights are of, such as ``resnet50``.
            channels_in: channels of the volume; timm adapts the first kernel.
            encoder: further options of the ``lifted2d`` encoder, such as ``encoder.kind=slices``.
        """

        model: str
        channels_in: int = Field(default=1, ge=1)
        encoder: dict[str, Any] = Field(default_factory=dict)

    config: Config

    def read(self, path: Path) -> Foreign:
        """Read a state dict.

        Raises:
            UserError: another kind of file, no such network in timm, or weights that timm cannot give to it.
        """
        tensors = state_dict(read(path), path, at=("state_dict_ema", "state_dict", "model", "model_ema"))
        options = {**self.config.encoder, "model": self.config.model}
        config = parse(Lifted2D.Config, options, where="options", prefix="encoder")
        encoder, loaded, found = self._lifted(path, config, tensors)
        used = _used(tensors, loaded)
        adapted = sorted(name for name in used if not _among(tensors[name], loaded))
        return Foreign(
            encoder={"name": "lifted2d", **encoder.config.model_dump(mode="json")},
            tensors=found,
            channels_in=self.config.channels_in,
            unused=tuple(name for name in tensors if name not in used),
            format=f"timm {self.config.model}, 2D",
            notes=(f"timm adapted {', '.join(adapted)}",) if adapted else (),
        )

    def _lifted(
        self, path: Path, config: Lifted2D.Config, tensors: dict[str, Tensor]
    ) -> tuple[Lifted2D, dict[str, Tensor], dict[str, Tensor]]:
        """The encoder with the file's weights, and what came from the file: by 2D name in 2D, by our name lifted."""
        from safetensors.torch import save_file

        changed = {n: t * 1.25 + 0.5 if t.is_floating_point() else t for n, t in tensors.items()}
        built = []
        with tempfile.TemporaryDirectory() as folder:
            plain = Path(folder) / "plain.safetensors"  # timm would unpickle another file without asking
            try:
                for weights in (tensors, changed):
                    save_file({n: t.contiguous().clone() for n, t in weights.items()}, plain)
                    with torch.random.fork_rng(devices=[]):
                        torch.manual_seed(0)
                        network = network_2d(config.model, self.config.channels_in, weights=plain)
                    built.append({n: t.clone() for n, t in network.state_dict().items()})
                save_file({n: t.contiguous().clone() for n, t in tensors.items()}, plain)
                encoder = Lifted2D(config, self.config.channels_in, weights=plain)
            except (ValueError, KeyError, RuntimeError) as error:
                reason = " ".join(str(error).split())[:300]
                raise UserError(
                    f"{path}: timm cannot give these weights to {config.model}: {reason}"
                ) from error
        first, second = built
        names = {n for n, t in first.items() if not t.is_floating_point() or not torch.equal(t, second[n])}
        if not any(first[name].is_floating_point() for name in names):
            raise UserError(
                f"{path} holds nothing of timm's {config.model}; its tensors are named {_some(tensors)}"
            )
        # lifting keeps the order of the layers but not all their names
        own = {n: t for n, t in encoder.state_dict().items() if n.startswith(INSIDE)}
        places = dict(zip(first, own, strict=True))
        loaded = {name: first[name] for name in first if name in names}
        return encoder, loaded, {f"encoder.{places[name]}": own[places[name]] for name in loaded}


def _used(tensors: dict[str, Tensor], loaded: dict[str, Tensor]) -> set[str]:
    """Names in the file of what timm took from it.

    By name; then, among the places that no name explains, by value (timm renamed it) and by the end of the name (it was
    renamed and adapted). Ends alone would take ``norm.weight`` for ``layers_1.downsample.norm.weight``.
    """
    flat = {_joined(name): name for name in loaded}
    used = {name for name in tensors if _joined(name) in flat}
    taken = {_joined(name) for name in used}
    left = {own: loaded[own] for place, own in flat.items() if place not in taken}
    renamed = {name for name in tensors if name not in used and _among(tensors[name], left)}
    values = [tensors[name] for name in renamed]
    left = {own: tensor for own, tensor in left.items() if not any(_same(tensor, value) for value in values)}
    ends = {
        name
        for name in tensors
        if name not in used | renamed and any(_ends_alike(_joined(own), _joined(name)) for own in left)
    }
    return used | renamed | ends


def _joined(name: str) -> str:
    """A name as networks of maps have it in timm: stem.0.weight is stem_0.weight there, or model.stem.0.weight."""
    return name.removeprefix("model.").replace(".", "_")


def _ends_alike(first: str, second: str) -> bool:
    """Whether the longer of two names ends in the other."""
    return f"_{first}".endswith(f"_{second}") or f"_{second}".endswith(f"_{first}")


def _same(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and torch.equal(first, second)


def _among(tensor: Tensor, loaded: dict[str, Tensor]) -> bool:
    """Whether a tensor stands among the loaded ones, under whatever name."""
    return any(_same(tensor, other) for other in loaded.values())


def _some(tensors: dict[str, Tensor]) -> str:
    return ", ".join(list(tensors)[:3])
