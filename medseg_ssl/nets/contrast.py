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
    return torch.cat(dist.gather(embedding_BE), dim=0)


def pair_info_nce(
    a_BE: Tensor, b_BE: Tensor, subject_B: Tensor, used_B: Tensor, *, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Symmetric InfoNCE between the two views of each sample (CLIP, arXiv 2103.00020), in float32.

    Args:
        a_BE: embeddings of the first views.
        b_BE: embeddings of the second views.
        subject_B: int64 number of the subject; views of one subject are no negatives of each other.
        used_B: bool, samples that take part.
        scale: scalar, the inverse temperature.

    Returns:
        The loss and the top-1 retrieval within the batch.
    """
    a = functional.normalize(a_BE.float(), dim=-1)
    b = functional.normalize(b_BE.float(), dim=-1)
    a, b, subject, used = gather(a), gather(b), gather(subject_B), gather(used_B)
    own = torch.eye(len(a), dtype=torch.bool, device=a.device)
    ignored = ((subject[:, None] == subject[None, :]) | ~used[None, :]) & ~own
    similarity = scale * (a @ b.T)
    logits = similarity.masked_fill(ignored, float("-inf"))
    logits_t = similarity.T.masked_fill(ignored, float("-inf"))
    wanted = torch.arange(len(a), device=a.device)
    both = functional.cross_entropy(logits, wanted, reduction="none") + functional.cross_entropy(
        logits_t, wanted, reduction="none"
    )
    weight = used.float()
    total = weight.sum().clamp(min=1.0)
    hits = ((logits.argmax(1) == wanted) * weight).sum() / total
    return 0.5 * (both * weight).sum() / total, hits.detach()
