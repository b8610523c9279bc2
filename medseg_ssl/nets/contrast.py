"""Losses between whole-view embeddings, gathered over devices."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def gather(embedding_BE: Tensor) -> Tensor:
    """Embeddings of all processes along the batch, with gradient; the input itself in a single process."""
    from lightly.utils import dist

    if dist.world_size() == 1:
        return embedding_BE
    return torch.cat(dist.gather(embedding_BE.contiguous()), dim=0)  # NCCL takes no views


def similarities(a_XE: Tensor, b_YE: Tensor) -> Tensor:
    """Inner products (X, Y) in float32, also under autocast, which would cast them back to bfloat16."""
    with torch.autocast(a_XE.device.type, enabled=False):
        return a_XE.float() @ b_YE.float().T


def process_number() -> int:
    """Which of the processes this is; 0 in a single one."""
    from lightly.utils import dist

    return dist.rank()


def nt_xent(a_BE: Tensor, b_BE: Tensor, *, temperature: float) -> Tensor:
    """NT-Xent (SimCLR, arXiv 2002.05709) of this process' samples among those of all, in float32.

    Equal to lightly's ``NTXentLoss``, whose indexing by booleans makes the host wait for a GPU in every step.

    Args:
        a_BE: embeddings of the first views.
        b_BE: embeddings of the second views.
        temperature: what similarities are divided by.
    """
    a, b = (functional.normalize(x.float(), dim=-1) for x in (a_BE, b_BE))
    every_XE = torch.cat([gather(a), gather(b)])
    own_B = torch.arange(len(a), device=a.device) + process_number() * len(a)
    partner_B = own_B + len(every_XE) // 2
    logits = similarities(torch.cat([a, b]), every_XE) / temperature
    numbers_X = torch.arange(len(every_XE), device=a.device)
    itself = torch.cat([own_B, partner_B])[:, None] == numbers_X
    return functional.cross_entropy(logits.masked_fill(itself, float("-inf")), torch.cat([partner_B, own_B]))


def pair_info_nce(a_BE: Tensor, b_BE: Tensor, subject_B: Tensor, *, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric InfoNCE between the two views of each sample (CLIP, arXiv 2103.00020), in float32.

    Args:
        a_BE: embeddings of the first views.
        b_BE: embeddings of the second views.
        subject_B: int64 number of the subject; views of one subject are no negatives of each other.
        scale: scalar, the inverse temperature.

    Returns:
        The loss and the top-1 retrieval within the batch.
    """
    a = functional.normalize(a_BE.float(), dim=-1)
    b = functional.normalize(b_BE.float(), dim=-1)
    a, b, subject = gather(a), gather(b), gather(subject_B)
    own = torch.eye(len(a), dtype=torch.bool, device=a.device)
    ignored = (subject[:, None] == subject[None, :]) & ~own
    similarity = scale.float() * similarities(a, b)
    logits = similarity.masked_fill(ignored, float("-inf"))
    logits_t = similarity.T.masked_fill(ignored, float("-inf"))
    wanted = torch.arange(len(a), device=a.device)
    loss = functional.cross_entropy(logits, wanted) + functional.cross_entropy(logits_t, wanted)
    return 0.5 * loss, (logits.argmax(1) == wanted).float().mean()
