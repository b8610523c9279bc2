"""Regions of an unlabeled crop that may be parts of the anatomy, grown from supervoxels.

All happens on the small graph of supervoxels that touch: neighbours that are alike merge into ever larger regions (by
Ward's criterion; Uijlings et al., "Selective search for object recognition", doi 10.1007/s11263-013-0620-5), and those
whose intensity lies in a band form connected components. A region is a set of supervoxels, so features are averaged
over many regions without a pass over the voxels for each.

One crop at a time, on its device, without waiting for it. Suffixes: K supervoxels (some may have no voxel), T pairs of
them that may touch, P partitions, N regions, F features, X crops.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from medseg_ssl.config import Record
from medseg_ssl.nets.supervoxels import Touching, evened, seed_cell, supervoxels, touching
from medseg_ssl.nets.tokens import grid_of
from medseg_ssl.types import TripleMm

UNKNOWN = -2
"""Label of a voxel that lies beyond the crop in which supervoxels were made, or where that has no data."""


class Growth(Record):
    """How regions are grown from the intensities of a crop.

    Attributes:
        supervoxels: about how many a crop is cut into.
        compactness: of supervoxels: the difference of intensity, of -1 to 1, that weighs as much as the distance
            between two seeds.
        rounds: of merging; each takes away about a third of the regions.
        texture: largest weight of the deviation of intensities within a supervoxel beside their mean. Weights are drawn
            for each crop, so that no single rule makes all regions.
        place: smallest and largest weight of the place in the crop (from 0 to 1 along its mean side) beside intensities
            from -1 to 1: with much of it regions are round, with little they follow the intensities wherever they go.
        bands: intensity bands whose components are regions too.
        band_width: smallest and largest width of a band, of intensities from -1 to 1.
    """

    supervoxels: int = Field(default=400, ge=8)
    compactness: float = Field(default=0.7, gt=0.0)
    rounds: int = Field(default=16, ge=1)
    texture: float = Field(default=0.5, ge=0.0)
    place: tuple[float, float] = (0.1, 1.0)
    bands: int = Field(default=8, ge=1)
    band_width: tuple[float, float] = (0.3, 1.0)

    @model_validator(mode="after")
    def _ordered(self) -> Growth:
        for name, (low, high) in {"place": self.place, "band_width": self.band_width}.items():
            if not 0.0 < low <= high:
                raise ValueError(f"{name} must be 0 < low <= high, got {(low, high)}")
        return self


class Cut(NamedTuple):
    """A crop cut into supervoxels.

    Attributes:
        label_DHW: int64 number of each voxel's supervoxel; ``NO_BODY`` outside.
        voxels_K: float32, of each supervoxel.
        value_KC: mean intensity, about -1 to 1.
        deviation_KC: its standard deviation within the supervoxel.
        place_K3: centre, from 0 to 1 along the mean side of the crop.
        pairs: which may touch.
    """

    label_DHW: Tensor
    voxels_K: Tensor
    value_KC: Tensor
    deviation_KC: Tensor
    place_K3: Tensor
    pairs: Touching


class Partitions(NamedTuple):
    """Several ways to put the supervoxels of a crop together.

    Attributes:
        root_PK: number of the region each supervoxel belongs to, which is that of its lowest supervoxel; K for those in
            no region.
        fresh_PK: bool, True at the number of each region that no earlier partition holds.
    """

    root_PK: Tensor
    fresh_PK: Tensor


class Regions(NamedTuple):
    """Regions drawn from partitions.

    Attributes:
        member_NK: bool, supervoxels of each region.
        valid_N: bool, False where there were fewer regions than asked for.
    """

    member_NK: Tensor
    valid_N: Tensor


# -- from a crop to partitions ---------------------------------------------------------------------------------------


def cut(growth: Growth, image_CDHW: Tensor, inside_DHW: Tensor, spacing_mm: TripleMm) -> Cut:
    """Cut a crop into supervoxels and measure them.

    Args:
        growth: how.
        image_CDHW: the crop without intensity augmentation.
        inside_DHW: bool, voxels that belong to the body.
        spacing_mm: voxel size (D, H, W).
    """
    size = inside_DHW.shape
    even_CDHW = evened(image_CDHW, inside_DHW)
    cell = seed_cell(size, spacing_mm, count=growth.supervoxels)
    label_DHW = supervoxels(
        even_CDHW, inside_DHW, cell=cell, spacing_mm=spacing_mm, compactness=growth.compactness
    )
    grid = grid_of(size, cell)
    count = grid[0] * grid[1] * grid[2]
    side_mm = math.prod(n * mm for n, mm in zip(size, spacing_mm, strict=True)) ** (1 / 3)
    axes = [
        torch.arange(n, device=label_DHW.device) * (mm / side_mm)
        for n, mm in zip(size, spacing_mm, strict=True)
    ]
    place_3DHW = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    mean_KF = averaged(torch.cat([even_CDHW, even_CDHW.square(), place_3DHW]), label_DHW, count)
    value_KC, square_KC, place_K3 = mean_KF.split([len(even_CDHW), len(even_CDHW), 3], dim=1)
    deviation_KC = (square_KC - value_KC.square()).clamp(min=0.0).sqrt()
    voxels_K = counted(label_DHW, count)
    return Cut(label_DHW, voxels_K, value_KC, deviation_KC, place_K3, touching(label_DHW, grid))


def merged(growth: Growth, pieces: Cut, generator: torch.Generator) -> Partitions:
    """Regions of like intensity, texture and place, in all sizes; how much each counts is drawn."""
    channels = pieces.value_KC.shape[1]
    drawn = torch.rand(2 * channels + 1, generator=generator)
    low, high = growth.place
    place = low * (high / low) ** drawn[-1:]
    weight_F = torch.cat([0.3 + 0.7 * drawn[:channels], growth.texture * drawn[channels:-1], place.expand(3)])
    features_KF = torch.cat([pieces.value_KC, pieces.deviation_KC, pieces.place_K3], dim=1)
    weight_F = weight_F.to(features_KF.device, non_blocking=True)
    return agglomerate(features_KF * weight_F, pieces.voxels_K, pieces.pairs, rounds=growth.rounds)


def banded(growth: Growth, pieces: Cut, generator: torch.Generator) -> Partitions:
    """Connected regions whose intensity lies in a band; bands and channels are drawn."""
    channels = pieces.value_KC.shape[1]
    channel_P = torch.randint(channels, (growth.bands,), generator=generator)
    drawn_2P = torch.rand(2, growth.bands, generator=generator)
    narrow, wide = growth.band_width
    middle_P, half_P = 2 * drawn_2P[0] - 1, (narrow + (wide - narrow) * drawn_2P[1]) / 2
    device = pieces.value_KC.device
    channel_P, middle_P, half_P = (x.to(device, non_blocking=True) for x in (channel_P, middle_P, half_P))
    value_PK = pieces.value_KC.T[channel_P]
    marked_PK = ((value_PK - middle_P[:, None]).abs() <= half_P[:, None]) & (pieces.voxels_K > 0)
    return components(marked_PK, pieces.pairs)


def alike(growth: Growth, pieces: Cut, map_CDHW: Tensor) -> Partitions:
    """Regions whose features in a network's map are alike, in all sizes."""
    features_KC = averaged(map_CDHW, pieces.label_DHW, len(pieces.voxels_K))
    share_K1 = (pieces.voxels_K / pieces.voxels_K.sum().clamp(min=1.0))[:, None]
    centred_KC = features_KC - (features_KC * share_K1).sum(dim=0)
    # each channel counts alike, whatever its scale
    deviation_C = (centred_KC.square() * share_K1).sum(dim=0).sqrt()
    features_KC = centred_KC / deviation_C.clamp(min=1e-6)
    return agglomerate(features_KC, pieces.voxels_K, pieces.pairs, rounds=growth.rounds)


# -- partitions ------------------------------------------------------------------------------------------------------


def agglomerate(features_KF: Tensor, voxels_K: Tensor, pairs: Touching, *, rounds: int) -> Partitions:
    """Merge supervoxels that touch and are alike, a partition after each round.

    In a round every two regions merge that are each other's nearest by Ward's criterion, the growth of the sum of
    squared deviations; so small regions go first and no order has to be kept.

    Args:
        features_KF: mean features of each supervoxel, scaled so that equal differences weigh alike.
        voxels_K: voxels of each supervoxel; those without any take no part.
        pairs: which touch.
        rounds: partitions; each takes away about a third of the regions until none of the rest touch.
    """
    count, device = len(voxels_K), features_KF.device
    numbers_K = torch.arange(count, device=device)
    root_K = torch.where(voxels_K > 0, numbers_K, count)
    size_K = voxels_K.float()
    mean_FK = features_KF.float().T.contiguous()  # rows of many numbers are gathered faster than many of few
    # among equals (a flat image) everyone would choose the lowest number, and hardly two each other
    steps_T = torch.arange(len(pairs.first_T), device=device)
    jitter_T = 1e-6 * torch.frac(steps_T * 0.6180339887)
    roots, fresh = [], []
    for _ in range(rounds):
        a_T, b_T = root_K[pairs.first_T].clamp(max=count - 1), root_K[pairs.second_T].clamp(max=count - 1)
        weight_T = size_K[a_T] * size_K[b_T] / (size_K[a_T] + size_K[b_T]).clamp(min=1.0)
        square_T = (mean_FK.index_select(1, a_T) - mean_FK.index_select(1, b_T)).square().sum(dim=0)
        cost_T = weight_T * (square_T + jitter_T)
        apart_T = pairs.there_T & (a_T != b_T) & (weight_T > 0)
        cost_T = cost_T.where(apart_T, torch.inf)
        from_E, to_E, cost_E = torch.cat([a_T, b_T]), torch.cat([b_T, a_T]), torch.cat([cost_T, cost_T])
        best_K = torch.full_like(size_K, torch.inf).scatter_reduce(0, from_E, cost_E, "amin")
        wanted_E = torch.where((cost_E == best_K[from_E]) & cost_E.isfinite(), to_E, count)
        partner_K = torch.full_like(numbers_K, count).scatter_reduce(0, from_E, wanted_E, "amin")
        back_K = torch.cat([partner_K, partner_K.new_full((1,), count)])[partner_K]
        mutual_K = (partner_K < count) & (back_K == numbers_K)
        into_K = torch.where(mutual_K, torch.minimum(numbers_K, partner_K), numbers_K)
        sums_FK = torch.zeros_like(mean_FK).index_add_(1, into_K, mean_FK * size_K)
        size_K = torch.zeros_like(size_K).index_add_(0, into_K, size_K)
        mean_FK = sums_FK / size_K.clamp(min=1.0)
        root_K = torch.cat([into_K, into_K.new_full((1,), count)])[root_K]
        roots.append(root_K)
        fresh.append(mutual_K & (numbers_K < partner_K))
    return Partitions(torch.stack(roots), torch.stack(fresh))


def components(marked_PK: Tensor, pairs: Touching, *, rounds: int = 8) -> Partitions:
    """Connected components of marked supervoxels.

    Args:
        marked_PK: bool, as many markings as partitions are wanted.
        pairs: which touch.
        rounds: of passing the lowest number on, which goes twice as far each time or more; a longer component may stay
            in parts.
    """
    count = marked_PK.shape[1]
    numbers_K = torch.arange(count, device=marked_PK.device)
    root_PK = torch.where(marked_PK, numbers_K, count)
    together_PT = marked_PK[:, pairs.first_T] & marked_PK[:, pairs.second_T] & pairs.there_T
    for _ in range(rounds):
        a_PT, b_PT = root_PK[:, pairs.first_T], root_PK[:, pairs.second_T]
        low_PT = torch.minimum(a_PT, b_PT).where(together_PT, count)
        # the lowest number goes to both regions, not only to the two supervoxels that touch
        padded_PX = functional.pad(root_PK, (0, 1), value=count)
        lowest_PX = functional.pad(numbers_K.expand_as(root_PK), (0, 1), value=count)
        lowest_PX = lowest_PX.scatter_reduce(1, a_PT, low_PT, "amin").scatter_reduce(1, b_PT, low_PT, "amin")
        lowest_PX = torch.minimum(lowest_PX, lowest_PX.gather(1, lowest_PX))
        root_PK = lowest_PX.gather(1, padded_PX)[:, :count]
        root_PK = torch.where(marked_PK, root_PK, count)
    return Partitions(root_PK, (root_PK == numbers_K) & marked_PK)


def weighed(partitions: Partitions, weight_K: Tensor) -> Tensor:
    """Sum (P, K) of what its supervoxels weigh, at the number of each region."""
    shape, count = partitions.root_PK.shape, len(weight_K)
    sums = weight_K.new_zeros(shape[0], count + 1)
    return sums.scatter_add_(1, partitions.root_PK, weight_K.expand(shape))[:, :count]


def draw_regions(
    kinds: Sequence[Partitions],
    odds: Sequence[float],
    *,
    voxels_XK: Tensor,
    limits: tuple[float, float],
    count: int,
    generator: torch.Generator,
) -> Regions:
    """Draw regions of all sizes alike: each octave of size as often as another, and in it each kind by its odds.

    Args:
        kinds: partitions to draw from; a region that several hold is taken from the one where it is fresh.
        odds: of each kind, where it has regions of a size.
        voxels_XK: voxels of each supervoxel in each of some crops. A region must have its size in all of them; in the
            first it is measured.
        limits: smallest and largest share that a region may have of a crop's supervoxels.
        count: regions to draw, without repetition.
        generator: on the CPU, so that every device draws the same.
    """
    scores = []
    octaves = 1 + int(-math.log2(limits[0]))
    for partitions, odd in zip(kinds, odds, strict=True):
        share_XPK = torch.stack([weighed(partitions, v_K / v_K.sum().clamp(min=1.0)) for v_K in voxels_XK])
        usable_PK = ((share_XPK >= limits[0]) & (share_XPK <= limits[1])).all(dim=0) & partitions.fresh_PK
        octave_PK = (-share_XPK[0].clamp(min=limits[0]).log2()).long()
        alike_O = torch.zeros(octaves, device=octave_PK.device)
        alike_O.index_add_(0, octave_PK.flatten(), usable_PK.flatten().float())
        chance_PK = odd / alike_O.clamp(min=1.0)[octave_PK]
        # with Gumbel noise, the largest of the sums are a draw by these chances
        uniform = torch.rand(chance_PK.shape, generator=generator).clamp(1e-9, 1 - 1e-7)
        gumbel_PK = -(-uniform.log()).log().to(chance_PK.device, non_blocking=True)
        scores.append((chance_PK.log() + gumbel_PK).masked_fill(~usable_PK, -torch.inf))
    score_PK, root_PK = torch.cat(scores), torch.cat([p.root_PK for p in kinds])
    best = score_PK.flatten().topk(min(count, score_PK.numel()))
    valid_N, voxels = best.values.isfinite(), score_PK.shape[1]
    partition_N, number_N = best.indices // voxels, best.indices % voxels
    member_NK = (root_PK[partition_N] == number_N[:, None]) & valid_N[:, None]
    missing = count - len(valid_N)
    return Regions(functional.pad(member_NK, (0, 0, 0, missing)), functional.pad(valid_N, (0, missing)))


# -- between crops and maps ------------------------------------------------------------------------------------------


def seen_from(label_DHW: Tensor, known_DHW: Tensor, between_44: Tensor, size: Sequence[int]) -> Tensor:
    """The labels (D, H, W) at the voxels of another crop: those of the nearest voxels, ``UNKNOWN`` where there is none.

    Args:
        label_DHW: int64 labels of a crop.
        known_DHW: bool, voxels of that crop whose label means something.
        between_44: from indices of the other crop to those of this one (``correspondence.affine_between``).
        size: voxels of the other crop.
    """
    device = label_DHW.device
    matrix_44 = between_44.float()
    steps = [torch.arange(n, device=device, dtype=torch.float32) for n in size]
    flat = torch.zeros((), dtype=torch.long, device=device)
    inside = torch.ones((), dtype=torch.bool, device=device)
    for row, voxels in zip(matrix_44[:3], label_DHW.shape, strict=True):
        place_DHW = (
            row[0] * steps[0][:, None, None] + row[1] * steps[1][:, None] + (row[2] * steps[2] + row[3])
        )
        nearest_DHW = place_DHW.round().long()
        inside = inside & (nearest_DHW >= 0) & (nearest_DHW < voxels)
        flat = flat * voxels + nearest_DHW.clamp(0, voxels - 1)
    found = label_DHW.masked_fill(~known_DHW, UNKNOWN).flatten()[flat]
    return found.masked_fill(~inside, UNKNOWN)


def voxels_of(member_NK: Tensor, label_DHW: Tensor) -> Tensor:
    """Regions as voxels (N, D, H, W), bool, from the supervoxels they hold and the labels of a crop."""
    padded_NX = functional.pad(member_NK, (0, 1))  # the last column stands for no supervoxel
    return padded_NX[:, torch.where(label_DHW >= 0, label_DHW, member_NK.shape[1])]


def counted(label_DHW: Tensor, count: int) -> Tensor:
    """Voxels (K,), float32, of each of ``count`` supervoxels."""
    flat = _slots(label_DHW, count)
    ones = torch.ones((), device=flat.device).expand(flat.shape)
    return torch.zeros(count + 1, device=flat.device).index_add_(0, flat, ones)[:count]


def averaged(map_CDHW: Tensor, label_DHW: Tensor, count: int) -> Tensor:
    """Mean features (K, C), float32, of each of ``count`` supervoxels; 0 for one without a voxel.

    Args:
        map_CDHW: features; where a map is coarser than the labels, a cell counts for the supervoxel at its middle.
        label_DHW: numbers of the supervoxels.
        count: supervoxels.
    """
    label = label_DHW
    for axis, (voxels, cells) in enumerate(zip(label_DHW.shape, map_CDHW.shape[1:], strict=True)):
        if cells != voxels:
            stride = -(-voxels // cells)
            middle = torch.arange(cells, device=label.device) * stride + stride // 2
            label = label.index_select(axis, middle.clamp(max=voxels - 1))
    flat = _slots(label, count)
    features_CM = map_CDHW.float().flatten(1)
    sums_CK = features_CM.new_zeros(len(features_CM), count + 1).index_add(1, flat, features_CM)[:, :count]
    return (sums_CK / counted(label, count).clamp(min=1.0)).T


def _slots(label_DHW: Tensor, count: int) -> Tensor:
    return torch.where(label_DHW >= 0, label_DHW, count).flatten()
