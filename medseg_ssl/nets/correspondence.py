"""The same physical place in two views: sampling points, reading features there, and the dense InfoNCE loss."""

from __future__ import annotations

import zlib
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from medseg_ssl import draws
from medseg_ssl.nets.contrast import gather, process_number, similarities
from medseg_ssl.nets.decoders.base import Decoder
from medseg_ssl.nets.heads import VoxelHead
from medseg_ssl.types import Batch, Triple, View


class Points(NamedTuple):
    """Points of one physical place each, seen in two views.

    Attributes:
        index_a_BN3: float32 voxel index (D, H, W) in view a.
        index_b_BN3: float32 voxel index (D, H, W) in view b.
        mm_BN3: float32 RAS millimetres, relative to the mean of the sample's points.
        usable_BN: bool; False where a sample has fewer common points than asked for.
    """

    index_a_BN3: Tensor
    index_b_BN3: Tensor
    mm_BN3: Tensor
    usable_BN: Tensor


def affine_between(from_B44: Tensor, to_B44: Tensor) -> Tensor:
    """Affine (B, 4, 4), float64, from voxel indices of one view to voxel indices of another."""
    # unchecked, since the check waits for the device; an affine has an inverse
    return torch.linalg.solve_ex(to_B44.double(), from_B44.double()).result


def transform(affine_B44: Tensor, points_BN3: Tensor) -> Tensor:
    """Apply an affine to points (B, N, 3), in float64."""
    points = points_BN3.double()
    return points @ affine_B44[:, :3, :3].transpose(1, 2) + affine_B44[:, None, :3, 3]


def common_points(a: View, b: View, batch: Batch, *, count: int, purpose: str) -> Points:
    """Draw ``count`` body voxels of view a that are body in view b too.

    The draw is a function of (seed, sample index, purpose) and made on the CPU, so every device sees the same points.
    """
    device = a.image_BCDHW.device
    a_to_b = affine_between(a.affine_B44, b.affine_B44)
    grids, mapped, usable = [], [], []
    size_a, size_b = a.foreground_BDHW.shape[1:], b.foreground_BDHW.shape[1:]
    limit_b = torch.tensor([s - 1 for s in size_b], dtype=torch.float64).to(device, non_blocking=True)
    # A coarse pool of candidates keeps the work independent of the crop size.
    pool = min(8 * count, size_a[0] * size_a[1] * size_a[2])
    for i, sample in enumerate(batch.sample_index_B.tolist()):
        generator = draws.torch_generator(batch.seed, sample, purpose)
        chosen = torch.randperm(size_a[0] * size_a[1] * size_a[2], generator=generator)[:pool]
        index_a = torch.stack(torch.unravel_index(chosen, size_a), dim=-1).to(device, non_blocking=True)
        index_b = transform(a_to_b[i : i + 1], index_a[None])[0]
        inside = ((index_b >= -0.01) & (index_b <= limit_b + 0.01)).all(-1)
        near = (
            index_b.round()
            .long()
            .clamp(min=torch.zeros(3, dtype=torch.long, device=device), max=limit_b.long())
        )
        good = inside & a.foreground_BDHW[i][tuple(index_a.T)] & b.foreground_BDHW[i][tuple(near.T)]
        first = usable_first(good)[:count]
        grids.append(index_a[first])
        mapped.append(index_b[first])
        usable.append(good[first])
    index_a_BN3, usable_BN = torch.stack(grids), torch.stack(usable)
    mm = transform(a.affine_B44.double(), index_a_BN3)
    mm = mm - mm.mean(dim=1, keepdim=True)
    return Points(index_a_BN3.float(), torch.stack(mapped).float(), mm.float(), usable_BN)


def usable_first(usable_N: Tensor) -> Tensor:
    """Indices (N,) of the usable ones, in their order, and then of the others.

    A stable sort, so that no shape depends on the data.
    """
    return torch.sort((~usable_N).to(torch.int8), stable=True).indices


def read_features(map_BCDHW: Tensor, index_BN3: Tensor, stride: Triple) -> Tensor:
    """Trilinear features (B, N, C) of a map at voxel indices of its input.

    A map of stride s has its cell i centred at input voxel (i + 0.5)·s − 0.5.
    """
    size, steps = (
        torch.tensor(voxels, dtype=torch.float32).to(index_BN3.device, non_blocking=True)
        for voxels in (map_BCDHW.shape[2:], stride)
    )
    cell = (index_BN3 + 0.5) / steps - 0.5
    # grid_sample without align_corners: −1 and 1 are the outer faces; its last axis is (x, y, z) = (W, H, D).
    unit = ((cell + 0.5) / size * 2.0 - 1.0).flip(-1)
    # float32: bfloat16 coordinates would be off by a sixth of a voxel on a crop of 160
    grid = unit[:, :, None, None, :]
    read = functional.grid_sample(
        map_BCDHW.float(), grid, mode="bilinear", padding_mode="border", align_corners=False
    )
    return read[:, :, :, 0, 0].transpose(1, 2)


def dense_info_nce(
    a_BNE: Tensor,
    b_BNE: Tensor,
    points: Points,
    *,
    temperature: float,
    radius_mm: float | Tensor,
    subject_B: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Symmetric voxel InfoNCE (DenseCL, arXiv 2011.09157; PixPro, arXiv 2011.10043), in float32.

    Positives are the same point in both views; negatives are all other points of all processes, except points of the
    same sample nearer than ``radius_mm`` (a number, or one per sample): they show nearly the same tissue, and
    registration is never exact. Points of other samples with the same number in ``subject_B`` are no negatives either:
    they may show the same place.

    Returns:
        The loss and the share of points whose nearest neighbour among all candidates is their partner; both are 0 when
        no sample has a usable point.
    """
    batch, count, _ = a_BNE.shape
    a = functional.normalize(a_BNE.float(), dim=-1).reshape(batch * count, -1)
    b = functional.normalize(b_BNE.float(), dim=-1).reshape(batch * count, -1)
    usable = points.usable_BN.reshape(-1)
    # candidates X are the points of all processes, those of this one from `first` on
    every_a, every_b, seen_X = gather(a), gather(b), gather(usable.to(torch.uint8)).bool()
    first, points_in_all = batch * count * process_number(), len(every_a)
    wanted = torch.arange(batch * count, device=a.device) + first
    radius_B = torch.as_tensor(radius_mm, dtype=torch.float32).to(a.device, non_blocking=True).expand(batch)
    # without a matrix product, which a GPU may round to TF32: three digits are too few for a radius of some mm
    apart_BNN = torch.cdist(points.mm_BN3, points.mm_BN3, compute_mode="donot_use_mm_for_euclid_dist")
    near = torch.block_diag(*(apart_BNN < radius_B[:, None, None]))
    ignored = functional.pad(near, (first, points_in_all - first - len(near))) | ~seen_X
    if subject_B is not None:
        every_subject = gather(subject_B)
        own_B = torch.arange(batch, device=a.device) + batch * process_number()
        again_BX = subject_B[:, None] == every_subject
        again_BX = again_BX & (own_B[:, None] != torch.arange(len(every_subject), device=a.device))
        ignored = ignored | again_BX.repeat_interleave(count, 0).repeat_interleave(count, 1)
    ignored = ignored & (wanted[:, None] != torch.arange(points_in_all, device=a.device))
    logits = (similarities(a, every_b) / temperature).masked_fill(ignored, float("-inf"))
    logits_t = (similarities(b, every_a) / temperature).masked_fill(ignored, float("-inf"))
    both = functional.cross_entropy(logits, wanted, reduction="none") + functional.cross_entropy(
        logits_t, wanted, reduction="none"
    )
    weight = usable.float()
    # the mean over the points of all processes, whose gradients are averaged
    processes = points_in_all // len(a)
    loss = processes * (0.5 * (both * weight).sum() / seen_X.float().sum().clamp(min=1.0))
    hits = ((logits.argmax(dim=1) == wanted) * weight).sum() / weight.sum().clamp(min=1.0)
    return loss, hits.detach()


class DenseContrast(nn.Module):
    """The voxel term: a small head per decoder level and ``dense_info_nce`` between what two views show of one place.

    Supervising several levels, each with its own head, makes the coarse ones know where they are too.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        embedding: int,
        levels: int,
        points: int,
        temperature: float,
        radius_mm: float,
    ) -> None:
        super().__init__()
        channels = decoder.channels_out[:levels]
        self.heads = nn.ModuleList(VoxelHead(c, embedding, hidden=2 * embedding) for c in channels)
        self.strides = decoder.strides_out[:levels]
        self.points, self.temperature, self.radius_mm = points, temperature, radius_mm

    def forward(
        self,
        features: list[Tensor],
        a: View,
        b: View,
        batch: Batch,
        *,
        purpose: str,
        used_B: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Loss and top-1 over the levels' mean.

        Args:
            features: decoder maps of both views, those of a first along the batch, finest first.
            a: first view.
            b: second view.
            batch: gives seed and sample indices.
            purpose: name of the draw of points.
            used_B: bool, samples whose views share physical coordinates; None: all.
        """
        points = common_points(a, b, batch, count=self.points, purpose=purpose)
        if used_B is not None:
            points = points._replace(usable_BN=points.usable_BN & used_B[:, None])
        subject_B = subject_numbers(batch).to(points.usable_BN.device, non_blocking=True)
        losses, hits = [], []
        for head, stride, level in zip(self.heads, self.strides, features, strict=False):
            map_a, map_b = level.chunk(2)
            # read first, then the head: it works on the few points instead of every voxel
            read_a = head(_as_map(read_features(map_a, points.index_a_BN3, stride)))
            read_b = head(_as_map(read_features(map_b, points.index_b_BN3, stride)))
            # a coarse map shows points within a cell alike, so its radius grows with the cell
            radius_B = self.radius_mm + (max(stride) - 1) * a.spacing_mm_B3.min(dim=1).values
            loss, hit = dense_info_nce(
                _as_points(read_a),
                _as_points(read_b),
                points,
                temperature=self.temperature,
                radius_mm=radius_B,
                subject_B=subject_B,
            )
            losses.append(loss)
            hits.append(hit)
        return torch.stack(losses).mean(), torch.stack(hits).mean()


def subject_numbers(batch: Batch) -> Tensor:
    """A number (B,) per subject, int64: equal keys, equal numbers, on every process."""
    return torch.tensor([zlib.crc32(subject.encode()) for subject in batch.subject_B])


def _as_map(points_BNC: Tensor) -> Tensor:
    return points_BNC.transpose(1, 2)[..., None, None]


def _as_points(map_BCN11: Tensor) -> Tensor:
    return map_BCN11[..., 0, 0].transpose(1, 2)
