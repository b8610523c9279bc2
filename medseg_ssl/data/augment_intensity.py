"""Intensity augmentation on the device, from noise and blur to gamma, bias field and inversion.

Works on normalised intensities (about zero mean, unit scale). Each transform changes one channel of one
sample in place; most samples get few of them, so going sample by sample moves less memory than whole-batch
passes with the untouched samples blended back, and it makes a sample independent of its batch. Nothing waits
for the device. Of several channels each is 0 where it has no data itself, and keeps what it shows where another
one has none (``View.valid_BDHW`` is where all have data).

Order, probabilities and ranges of ``segmentation`` are those of nnU-Net v2.8 (``get_training_transforms``);
arXiv 1904.08128. Statistics are taken over valid voxels, which hold 0 where invalid before and after.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import numpy as np
from pydantic import Field

from medseg_ssl.config import Record
from medseg_ssl.draws import numpy_generator, torch_generator

if TYPE_CHECKING:
    from torch import Tensor

    from medseg_ssl.types import View


class Chance(Record):
    """One transform: how often and how strong.

    Attributes:
        p: probability per sample.
        low: lowest strength.
        high: highest strength.
        channel_p: probability per channel of a chosen sample.
    """

    p: Annotated[float, Field(ge=0, le=1)]
    low: float
    high: float
    channel_p: Annotated[float, Field(ge=0, le=1)] = 1.0


class Intensity(Record):
    """Transforms in the order they are applied; None leaves one out.

    Attributes:
        bias_field: strength is the largest log-gain of a smooth multiplicative field.
        noise: strength is the standard deviation.
        blur: strength is sigma in voxels, per axis.
        brightness: strength is a factor.
        contrast: strength is a factor on the distance to the mean; the range is kept.
        low_resolution: strength is the share of voxels kept per axis.
        gamma_inverted: exponent applied to the inverted image; mean and deviation are kept.
        gamma: exponent; mean and deviation are kept.
        inversion: dark becomes bright (strength unused); pushes contrastive features from intensity to shape.
        channel_dropout: a channel becomes zero, as where there is no data (strength unused); one always stays, so that
            a network learns to do with the modalities it is given.
    """

    bias_field: Chance | None = None
    noise: Chance | None = None
    blur: Chance | None = None
    brightness: Chance | None = None
    contrast: Chance | None = None
    low_resolution: Chance | None = None
    gamma_inverted: Chance | None = None
    gamma: Chance | None = None
    inversion: Chance | None = None
    channel_dropout: Chance | None = None


SEGMENTATION = Intensity(
    noise=Chance(p=0.1, low=0.0, high=0.1),
    blur=Chance(p=0.2, low=0.5, high=1.0, channel_p=0.5),
    brightness=Chance(p=0.15, low=0.75, high=1.25),
    contrast=Chance(p=0.15, low=0.75, high=1.25),
    low_resolution=Chance(p=0.25, low=0.5, high=1.0, channel_p=0.5),
    gamma_inverted=Chance(p=0.1, low=0.7, high=1.5),
    gamma=Chance(p=0.3, low=0.7, high=1.5),
)

INTENSITY: dict[str, Intensity] = {
    "none": Intensity(),
    "weak": Intensity(
        noise=Chance(p=0.2, low=0.0, high=0.05),
        brightness=Chance(p=0.2, low=0.9, high=1.1),
        contrast=Chance(p=0.2, low=0.9, high=1.1),
        gamma=Chance(p=0.2, low=0.9, high=1.1),
    ),
    "strong": Intensity(
        bias_field=Chance(p=0.3, low=0.1, high=0.5),
        noise=Chance(p=0.3, low=0.0, high=0.2),
        blur=Chance(p=0.3, low=0.5, high=1.5),
        brightness=Chance(p=0.3, low=0.7, high=1.3),
        contrast=Chance(p=0.3, low=0.65, high=1.5),
        low_resolution=Chance(p=0.25, low=0.5, high=1.0),
        gamma_inverted=Chance(p=0.15, low=0.7, high=1.5),
        gamma=Chance(p=0.5, low=0.6, high=1.7),
        inversion=Chance(p=0.05, low=1.0, high=1.0),
    ),
    "segmentation": SEGMENTATION,
    "segmentation_dropout": SEGMENTATION.model_copy(
        update={"channel_dropout": Chance(p=0.5, low=0.0, high=0.0, channel_p=0.5)}
    ),
}
"""Intensity recipe by the name in ``ViewSpec.augment``."""


def augmented(
    view: View, recipe: Intensity, *, seed: int, indices: Sequence[int], purpose: str, keep_clean: bool = True
) -> View:
    """A view with augmented intensities; the same object where nothing was drawn.

    Args:
        view: on any device. Its image is changed in place unless ``keep_clean``.
        recipe: what may happen.
        seed: of the run.
        indices: global sample index per sample.
        purpose: names the view among those of a sample.
        keep_clean: keep the image before augmentation as ``View.clean_BCDHW``.
    """
    plans = [_draw(recipe, seed, index, purpose, view.image_BCDHW.shape[1]) for index in indices]
    if not any(plans):
        return view
    image_BCDHW = view.image_BCDHW.clone() if keep_clean else view.image_BCDHW
    for sample, (plan, index) in enumerate(zip(plans, indices, strict=True)):
        if not plan:
            continue
        seen = {channel: _seen(view, sample, channel) for _, channel, _ in plan}
        full = {channel: _is_full(valid_DHW) for channel, valid_DHW in seen.items()}
        for number, (transform, channel, strength) in enumerate(plan):
            salt = f"intensity/{purpose}/{number}"
            transform(image_BCDHW[sample, channel], seen[channel], strength, _Source(seed, index, salt))
            if not full[channel]:
                image_BCDHW[sample, channel].mul_(seen[channel])
    return replace(view, image_BCDHW=image_BCDHW, clean_BCDHW=view.image_BCDHW if keep_clean else None)


def _seen(view: View, sample: int, channel: int) -> Tensor:
    # where a channel has data; of several, each may have some where another has none, which only its zeros tell: a
    # voxel there whose value is exactly 0 counts as no data
    if view.image_BCDHW.shape[1] == 1:
        return view.valid_BDHW[sample]
    return view.valid_BDHW[sample] | (view.image_BCDHW[sample, channel] != 0)


class _Source:
    # randomness of one transform, made only where it is used
    def __init__(self, seed: int, index: int, purpose: str) -> None:
        self.seed, self.index, self.purpose = seed, index, purpose

    def numpy(self) -> np.random.Generator:
        return numpy_generator(self.seed, self.index, self.purpose)

    def torch(self, device: str):
        return torch_generator(self.seed, self.index, self.purpose, device=device)


Transform = Callable[["Tensor", "Tensor", np.ndarray, _Source], None]


def _draw(
    recipe: Intensity, seed: int, index: int, purpose: str, channels: int
) -> list[tuple[Transform, int, np.ndarray]]:
    generator = numpy_generator(seed, index, f"intensity/{purpose}")
    plan = []
    for name, transform in TRANSFORMS.items():
        chance: Chance | None = getattr(recipe, name)
        chosen, per_channel, drawn = (
            generator.random(),
            generator.random(channels),
            generator.random((channels, 4)),
        )
        if chance is None or chosen >= chance.p:
            continue
        hit = per_channel < chance.channel_p
        if transform is _channel_dropout and hit.all():
            hit[per_channel.argmax()] = False
        for channel in np.flatnonzero(hit):
            plan.append((transform, int(channel), _strength(chance, drawn[channel])))
    return plan


def _strength(chance: Chance, drawn: np.ndarray) -> np.ndarray:
    # (3,) one value per axis; factors are as often below as above 1, whatever the range
    low, high = chance.low, chance.high
    if low < 1 < high:
        return np.where(drawn[3] < 0.5, low + drawn[:3] * (1 - low), 1 + drawn[:3] * (high - 1))
    return low + drawn[:3] * (high - low)


def _is_full(valid_DHW: Tensor) -> bool:
    # on a GPU the question would wait for the device, so invalid voxels are cleared there in any case
    return valid_DHW.device.type == "cpu" and bool(valid_DHW.numpy().all())


# -- transforms: (volume, valid, strength per axis, randomness), in place ------------------------------------


def _bias_field(x_DHW: Tensor, valid_DHW: Tensor, strength: np.ndarray, source: _Source) -> None:
    import torch
    from torch.nn.functional import interpolate

    # log-gains on a 4³ grid, stretched over the crop
    grid = torch.from_numpy(
        (source.numpy().random((1, 1, 4, 4, 4)) * 2 - 1).astype(np.float32) * float(strength[0])
    )
    gain = interpolate(
        grid.to(x_DHW.device, non_blocking=True), size=x_DHW.shape, mode="trilinear", align_corners=True
    )[0, 0].exp_()
    # intensities are centred on 0; the field multiplies what lies above the darkest voxel
    floor = x_DHW.amin()
    x_DHW.sub_(floor).mul_(gain).add_(floor)


def _noise(x_DHW: Tensor, valid_DHW: Tensor, strength: np.ndarray, source: _Source) -> None:
    import torch

    noise = torch.empty_like(x_DHW).normal_(generator=source.torch(str(x_DHW.device)))
    x_DHW.add_(noise, alpha=float(strength[0]))


def _blur(x_DHW: Tensor, valid_DHW: Tensor, strength: np.ndarray, source: _Source) -> None:
    import torch

    taps = [_gaussian(float(sigma)) for sigma in strength]
    if x_DHW.device.type == "cpu":
        from medseg_ssl.data import kernels

        volume = x_DHW.numpy()
        kernels.blur(volume.copy(), taps[0], taps[1], taps[2], volume)
        return
    blurred = x_DHW
    for axis, weights in enumerate(taps):
        matrix = torch.from_numpy(_band(weights, x_DHW.shape[axis])).to(x_DHW.device, non_blocking=True)
        blurred = (blurred.movedim(axis, -1) @ matrix.T).movedim(-1, axis)
    x_DHW.copy_(blurred)


def _gaussian(sigma: float) -> np.ndarray:
    # weights of the voxel itself, its neighbours, theirs, …; cut at three sigma
    distance = np.arange(max(1, int(np.ceil(3 * sigma))) + 1)
    weight = np.exp(-0.5 * (distance / max(sigma, 1e-3)) ** 2)
    return (weight / (weight[0] + 2 * weight[1:].sum())).astype(np.float32)


def _band(taps: np.ndarray, size: int) -> np.ndarray:
    # the convolution as a matrix (size, size), edges replicated
    matrix = np.zeros((size, size), np.float32)
    rows = np.arange(size)
    for offset in range(1 - taps.size, taps.size):
        np.add.at(matrix, (rows, np.clip(rows + offset, 0, size - 1)), taps[abs(offset)])
    return matrix


def _brightness(x_DHW: Tensor, valid_DHW: Tensor, strength: np.ndarray, source: _Source) -> None:
    x_DHW.mul_(float(strength[0]))


def _contrast(x_DHW: Tensor, valid_DHW: Tensor, strength: np.ndarray, source: _Source) -> None:
    low, high = x_DHW.aminmax()
    mean = x_DHW.sum() / _count(valid_DHW)
    factor = float(strength[0])
    x_DHW.mul_(factor).add_(mean * (1 - factor)).clamp_(low, high)


def _low_resolution(x_DHW: Tensor, valid_DHW: Tensor, strength: np.ndarray, source: _Source) -> None:
    from torch.nn.functional import interpolate

    coarse = [max(1, round(n * float(strength[0]))) for n in x_DHW.shape]
    small = interpolate(x_DHW[None, None], size=coarse, mode="nearest-exact")
    x_DHW.copy_(interpolate(small, size=x_DHW.shape, mode="trilinear", align_corners=False)[0, 0])


def _gamma(x_DHW: Tensor, valid_DHW: Tensor, strength: np.ndarray, source: _Source) -> None:
    _power(x_DHW, valid_DHW, float(strength[0]))


def _gamma_inverted(x_DHW: Tensor, valid_DHW: Tensor, strength: np.ndarray, source: _Source) -> None:
    _power(x_DHW.neg_(), valid_DHW, float(strength[0]))
    x_DHW.neg_()


def _power(x_DHW: Tensor, valid_DHW: Tensor, exponent: float) -> None:
    # ((x - low) / range) ** exponent, brought back to the mean and deviation of x over valid voxels
    count = _count(valid_DHW)
    low, high = x_DHW.aminmax()
    mean, std = _moments(x_DHW, count)
    x_DHW.sub_(low).mul_(1 / (high - low).clamp_min(1e-7)).clamp_(0, 1)
    # 2 ** (exponent · log2 x) is half the time of pow, and log2 0 = -inf gives back 0
    x_DHW.log2_().mul_(exponent).exp2_()
    at_zero = ((0 - low) / (high - low).clamp_min(1e-7)).clamp(0, 1) ** exponent
    new_mean, new_std = _moments(x_DHW, count, outside=at_zero)
    gain = std / new_std.clamp_min(1e-7)
    x_DHW.mul_(gain).add_(mean - new_mean * gain)


def _moments(x_DHW: Tensor, count: Tensor | int, *, outside: Tensor | None = None) -> tuple[Tensor, Tensor]:
    # mean and deviation over `count` valid voxels; the others all hold 0, or the value `outside`
    import torch

    flat = x_DHW.reshape(-1)
    total, square = flat.sum(), torch.dot(flat, flat)
    if outside is not None:
        missing = flat.numel() - count
        total, square = total - missing * outside, square - missing * outside**2
    mean = total / count
    return mean, (square / count - mean**2).clamp_min(0).sqrt()


def _inversion(x_DHW: Tensor, valid_DHW: Tensor, strength: np.ndarray, source: _Source) -> None:
    low, high = x_DHW.aminmax()
    x_DHW.neg_().add_(low + high)


def _channel_dropout(x_DHW: Tensor, valid_DHW: Tensor, strength: np.ndarray, source: _Source) -> None:
    x_DHW.zero_()


def _count(valid_DHW: Tensor) -> Tensor | int:
    if valid_DHW.device.type == "cpu":
        return max(1, int(np.count_nonzero(valid_DHW.numpy())))
    return valid_DHW.sum().clamp_min(1)


TRANSFORMS: dict[str, Transform] = {
    "bias_field": _bias_field,
    "noise": _noise,
    "blur": _blur,
    "brightness": _brightness,
    "contrast": _contrast,
    "low_resolution": _low_resolution,
    "gamma_inverted": _gamma_inverted,
    "gamma": _gamma,
    "inversion": _inversion,
    "channel_dropout": _channel_dropout,
}
"""Transform by its field in ``Intensity``, in the order of application."""
