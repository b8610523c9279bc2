"""The shelves as contract tests walk through them: a new file is picked up by listing."""

from typing import Any

from medseg_ssl.config import find, parse, shelf
from medseg_ssl.nets.decoders.base import Decoder
from medseg_ssl.nets.encoders.base import Encoder
from medseg_ssl.objectives.base import Objective

ENCODERS = shelf("medseg_ssl.nets.encoders")
DECODERS = shelf("medseg_ssl.nets.decoders")
OBJECTIVES = shelf("medseg_ssl.objectives")


def build_encoder(name: str, channels_in: int = 1, **options) -> Encoder:
    """With its default options, which are the smallest."""
    cls = find("medseg_ssl.nets.encoders", name, Encoder)
    return cls(parse(cls.Config, options), channels_in)


def build_decoder(name: str, encoder: Encoder) -> Decoder:
    cls = find("medseg_ssl.nets.decoders", name, Decoder)
    return cls(cls.Config(), encoder.channels, encoder.strides)


def options_for(objective: str) -> dict[str, Any]:
    """Options of an objective that make its step cheap, where it has them."""
    cheap = {"points": 64, "regions": 3, "width": 16}
    fields = find("medseg_ssl.objectives", objective, Objective).Config.model_fields
    return {name: value for name, value in cheap.items() if name in fields}


def encoder_for(objective: str) -> dict[str, Any]:
    """Block of the first encoder that an objective can train, narrow: a residual one where it will do."""
    needs = find("medseg_ssl.objectives", objective, Objective).needs
    fitting = [n for n in ENCODERS if issubclass(find("medseg_ssl.nets.encoders", n, Encoder), needs)]
    name = "resenc" if "resenc" in fitting else fitting[0]
    narrow = {"features": [4, 8, 8, 8], "embed_dim": 48, "depth": 2, "heads": 2}
    fields = find("medseg_ssl.nets.encoders", name, Encoder).Config.model_fields
    return {"name": name, **{key: value for key, value in narrow.items() if key in fields}}
