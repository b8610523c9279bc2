"""Randomness as a function of (seed, global sample index, purpose), never of rank, worker or call order."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np


def key(seed: int, index: int, purpose: str) -> int:
    """A 64-bit key of the triple; equal triples give equal keys on every machine."""
    digest = hashlib.blake2b(f"{seed}:{index}:{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def numpy_generator(seed: int, index: int, purpose: str) -> np.random.Generator:
    """A numpy generator for one purpose of one sample."""
    return np.random.Generator(np.random.Philox(key=key(seed, index, purpose)))


def torch_generator(seed: int, index: int, purpose: str, device: str = "cpu"):
    """A torch generator for one purpose of one sample, on ``device``."""
    import torch

    generator = torch.Generator(device=device)
    generator.manual_seed(key(seed, index, purpose) & 0x7FFF_FFFF_FFFF_FFFF)
    return generator


def uniform(seed: int, indices: Sequence[int], shape: Sequence[int], purpose: str):
    """Numbers in [0, 1) for one purpose of several samples: float32 (B, *shape), on the CPU."""
    import torch

    return torch.stack([torch.rand(*shape, generator=torch_generator(seed, i, purpose)) for i in indices])
