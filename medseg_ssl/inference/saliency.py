"""Where a small change of the image moves a segmenter's foreground most."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from medseg_ssl import draws
from medseg_ssl.data.resample import resample, spacing_of
from medseg_ssl.inference.predictor import Predictor

if TYPE_CHECKING:
    from medseg_ssl.data.archive import Archive

SAMPLES, NOISE = 8, 0.1
"""Noisy copies, and their noise as a share of the spread of the input."""


def input_saliency(predictor: Predictor, archive: Archive, case: str) -> np.ndarray:
    """Length of the gradient of the foreground's margin by the network's input, on the grid of the case's label.

    The margin is the log-odds of any foreground class against background, averaged over the voxels of one crop with the
    probability of foreground as weight (held fixed), so that it is defined where nothing is found too. Simonyan et
    al. 2014 (arXiv 1312.6034), averaged over noisy copies as in SmoothGrad (arXiv 1706.03825). The crop lies around
    the label, zero outside of it. It shows what the output is sensitive to, not why.

    Args:
        predictor: with its segmenter.
        archive: holds the case.
        case: a labeled case.

    Returns:
        float32 (D, H, W), not negative; channels combined by their root mean square.
    """
    given = predictor.network_input(archive, case)
    label_DHW, label_affine_44 = archive.original_label(case)
    centre = _centre(label_DHW, label_affine_44, given.affine_44)
    image_CDHW, inner, outer = _crop(given.image_CDHW, centre, predictor.crop_size, predictor.stride)
    spacing_13 = torch.tensor([spacing_of(given.affine_44)], dtype=torch.float32, device=predictor.device)
    image_1CDHW = torch.from_numpy(image_CDHW)[None].to(predictor.device)
    spread = NOISE * float(image_1CDHW.std())
    total_CDHW = torch.zeros_like(image_1CDHW[0])
    for sample in range(SAMPLES):
        noise = draws.torch_generator(0, sample, "saliency")
        shift_1CDHW = spread * torch.randn(image_1CDHW.shape, generator=noise).to(predictor.device)
        noisy_1CDHW = (image_1CDHW + shift_1CDHW).requires_grad_()
        # two equal ones: a batch of 1 is slow on a CPU (SLOW_ALONE_VOXELS)
        logits_BKDHW = predictor.segmenter(
            noisy_1CDHW.expand(2, -1, -1, -1, -1), spacing_13.expand(2, 3)
        ).float()
        margin_DHW = logits_BKDHW[0, 1:].logsumexp(dim=0) - logits_BKDHW[0, 0]
        weight_DHW = margin_DHW.detach().sigmoid()
        score = (weight_DHW * margin_DHW).sum() / weight_DHW.sum()
        total_CDHW += torch.autograd.grad(score, noisy_1CDHW)[0][0]
    strength_DHW = (total_CDHW / SAMPLES).square().mean(dim=0).sqrt().cpu().numpy()
    whole_DHW = np.zeros(given.image_CDHW.shape[1:], np.float32)
    whole_DHW[outer] = strength_DHW[inner]
    d, h, w = label_DHW.shape
    return np.maximum(resample(whole_DHW, given.affine_44, (d, h, w), label_affine_44, order=1), 0.0)


def _centre(label_DHW: np.ndarray, label_affine_44: np.ndarray, affine_44: np.ndarray) -> np.ndarray:
    """Index of the label's middle in another grid; the middle of the scan where nothing is labeled."""
    found_N3 = np.argwhere((label_DHW > 0) & (label_DHW < 255))
    middle_3 = found_N3.mean(axis=0) if len(found_N3) else (np.array(label_DHW.shape) - 1) / 2
    return (np.linalg.inv(affine_44) @ label_affine_44 @ np.array([*middle_3, 1.0]))[:3]


def _crop(
    image_CDHW: np.ndarray, centre: np.ndarray, size: tuple[int, int, int], stride: tuple[int, int, int]
) -> tuple[np.ndarray, tuple[slice, ...], tuple[slice, ...]]:
    """The crop around a place, zero where it leaves the image, with its inner part and that part's place."""
    shape = [c if c == 1 else math.ceil(c / s) * s for c, s in zip(size, stride, strict=True)]
    crop_CDHW = np.zeros((len(image_CDHW), *shape), np.float32)
    inner, outer = [], []
    for place, length, extent in zip(centre, shape, image_CDHW.shape[1:], strict=True):
        start = round(float(place) - (length - 1) / 2)
        # a crop that fits lies inside the image
        start = min(max(start, 0), extent - length) if extent >= length else -((length - extent) // 2)
        low, high = max(start, 0), min(start + length, extent)
        outer.append(slice(low, high))
        inner.append(slice(low - start, high - start))
    crop_CDHW[(slice(None), *inner)] = image_CDHW[(slice(None), *outer)]
    return crop_CDHW, tuple(inner), tuple(outer)
