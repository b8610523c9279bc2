"""Checkpoints of nnssl, as those of OpenMind (arXiv 2412.17041): ``network_weights`` and an ``nnssl_adaptation_plan``.

The plan names the architecture (``ResEncL``, ``PrimusM``, …, or the arguments of a ``ResidualEncoderUNet``), where the
encoder, its stem and its learned positions stand among the weights, and the crop of the pretraining.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from medseg_ssl.config import UserError, find
from medseg_ssl.nets import nnunet
from medseg_ssl.nets.decoders.unet import UNet
from medseg_ssl.nets.encoders.base import Encoder
from medseg_ssl.nets.encoders.resenc import SIZES, ResEnc
from medseg_ssl.nets.imports._files import read
from medseg_ssl.nets.imports.base import Foreign, Import, renamed, state_dict
from medseg_ssl.types import Triple, TripleMm

RESIDUAL = ("ResEncL", "NoSkipResEncL", "ResidualEncoderUNet")
