"""Randomness as a function of (seed, global sample index, purpose), never of rank, worker or call order."""

from __future__ import annotations

import hashlib

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
