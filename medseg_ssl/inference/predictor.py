"""A segmenter on whole scans.

It sees what it was trained on: the card's intensity policy and voxel spacing, zero where there is no data. Its
probabilities go back to the label's or input's own grid (linear, class by class) before the largest one wins. Where
no channel has data nothing was trained, and background is predicted.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from medseg_ssl.config import UserError
from medseg_ssl.data import intensity, nifti
from medseg_ssl.data.resample import grid_for_spacing, resample, resample_valid, same_grid, spacing_of
from medseg_ssl.inference.inputs import (
    Channel,
    Precision,
    archive_channel,
    autocast,
    close_spacing,
    crop_size_of,
    policy_for,
    usable_device,
)
from medseg_ssl.types import Triple

if TYPE_CHECKING:
    from medseg_ssl.data.archive import Archive
    from medseg_ssl.data.manifest import ScanRow
    from medseg_ssl.nets.encoder_file import Card

logger = logging.getLogger(__name__)

Alter = Callable[["ScanRow", Channel], Channel]
"""Changes one channel of a case, in physical units, before the network's grid and intensity policy."""

STITCH_ON_DEVICE_BYTES = 8 << 30
SLOW_ALONE_VOXELS = 100_000
"""Below this size the CPU computes two fp32 windows faster than one: torch's 3D convolution falls back to a slow path
at batch 1 (tiny U-Net, CPU time of 1 and 2 windows: 24³ 84 and 27 ms, 48³ 288 and 253 ms, 64³ 439 and 961 ms)."""


class NetworkInput(NamedTuple):
    """Normalised channels on one grid.

    Attributes:
        image_CDHW: float32, 0 where a channel has no data.
        affine_44: of the grid.
        empty: no channel holds anything but one value.
        seen_DHW: where any channel has data; None means everywhere.
    """

    image_CDHW: np.ndarray
    affine_44: np.ndarray
    empty: bool
    seen_DHW: np.ndarray | None = None


class Prediction(NamedTuple):
    """A label map (uint8) on the target grid and, where asked for, the probabilities (float32) of every
    class.
    """

    label_DHW: np.ndarray
    probabilities_KDHW: np.ndarray | None


class FilePrediction(NamedTuple):
    """A prediction and the grid of the file it belongs to, for ``nifti.write_nifti``."""

    prediction: Prediction
    original: nifti.OriginalGrid


class Predictor:
    """A segmenter on whole scans.

    Args:
        segmenter: module ``(image_BCDHW, spacing_mm_B3) -> logits_BKDHW`` at input size.
        card: what the segmenter was trained on (classes, crop size, spacing, intensity policy, modality per
            channel).
        device: torch device the segmenter runs on.
        precision: ``bf16`` runs under autocast.
        overlap: share of a window that the next one covers again.
        window_batch: windows (or whole small volumes) per forward pass; below 2 the CPU's 3D convolutions are
            slow.
        whole_volume: a volume of at most this many times the crop's voxels goes through in one pass.
        stride: the network's largest stride per axis; whole volumes are padded to its multiples.
        flips: average the logits over every mirroring that training used (2ⁿ passes for n axes).

    Raises:
        UserError: no such device, or ``flips`` for a network that never saw a mirrored crop.
    """

    def __init__(
        self,
        segmenter: nn.Module,
        card: Card,
        *,
        device: str = "cpu",
        precision: Precision = "fp32",
        overlap: float = 0.5,
        window_batch: int = 4,
        whole_volume: float = 2.0,
        stride: Triple = (1, 1, 1),
        flips: bool = False,
    ) -> None:
        if flips and not card.mirror_axes:
            raise UserError("the segmenter was trained without mirror_axes; flips show it what it never saw")
        self.device = usable_device(device)
        self.segmenter = segmenter.to(self.device).eval()
        self.card = card
        self.crop_size = crop_size_of(card)
        self.precision: Precision = precision
        self.overlap = overlap
        self.window_batch = max(2, window_batch)
        self.whole_volume = whole_volume
        self.stride = stride
        axes = [axis + 2 for axis in card.mirror_axes] if flips else []
        self._flips = [chosen for n in range(len(axes) + 1) for chosen in combinations(axes, n)]

    @classmethod
    def load(
        cls, path: Path, *, device: str = "cpu", precision: Precision = "fp32", **options: Any
    ) -> Predictor:
        """Read ``segmenter.safetensors``.

        Raises:
            UserError: the file holds an encoder alone, or is no encoder file.
        """
        from medseg_ssl.nets import encoder_file

        loaded = encoder_file.build(Path(path))
        if loaded.card.kind != "segmenter":
            raise UserError(
                f"{Path(path).name} holds an encoder, no segmenter; 'medseg-ssl finetune' makes one"
            )
        return cls(
            loaded.segmenter(),
            loaded.card,
            device=device,
            precision=precision,
            stride=largest_stride(loaded.encoder.strides),
            **options,
        )

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, background first."""
        return tuple(self.card.classes)

    # -- archive cases ---------------------------------------------------------------------------------------

    def predict_case(self, archive: Archive, case: str) -> np.ndarray:
        """Label map (uint8) of a case on its label's own grid (on the archive grid where it has no label)."""
        return next(iter(self.predict_cases(archive, [case])))[1]

    def predict_cases(
        self, archive: Archive, cases: Sequence[str], *, alter: Alter | None = None
    ) -> Iterator[tuple[str, np.ndarray]]:
        """``predict_case`` of many cases, in their order; small volumes of one padded shape share a forward pass.

        Args:
            archive: where the cases are.
            cases: their keys.
            alter: changes each channel, in physical units, before the network sees it.
        """
        for case, prediction in self._predictions(archive, cases, alter=alter, keep=False):
            yield case, prediction.label_DHW

    def case_probabilities(self, archive: Archive, cases: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
        """Probabilities (K, D, H, W), float32, of many cases, each on its label's own grid, in their order."""
        for case, prediction in self._predictions(archive, cases, alter=None, keep=True):
            assert prediction.probabilities_KDHW is not None
            yield case, prediction.probabilities_KDHW

    def _predictions(
        self, archive: Archive, cases: Sequence[str], *, alter: Alter | None, keep: bool
    ) -> Iterator[tuple[str, Prediction]]:
        for names, inputs in self._groups(archive, cases, alter):
            for case, given, probabilities in zip(
                names, inputs, self._probabilities(inputs, names), strict=True
            ):
                row = archive.cases[case]
                if row.labeled:
                    label_DHW, affine_44 = archive.original_label(case)
                    shape = label_DHW.shape
                else:
                    first = archive.scans[row.scans[0]]
                    shape, affine_44 = first.shape, np.asarray(first.affine_44)
                grid = (given.affine_44, shape, np.asarray(affine_44))
                yield case, self._to_grid(probabilities, *grid, keep=keep)

    def _groups(
        self, archive: Archive, cases: Sequence[str], alter: Alter | None
    ) -> Iterator[tuple[list[str], list[NetworkInput]]]:
        """Cases in their order, small ones together; one that needs windows is alone, since it may fill the memory."""
        names: list[str] = []
        inputs: list[NetworkInput] = []
        for case in cases:
            given = self.network_input(archive, case, alter)
            small = self._one_pass_shape(given.image_CDHW.shape[1:]) is not None
            if names and (not small or len(names) == self.window_batch):
                yield names, inputs
                names, inputs = [], []
            if small:
                names.append(case)
                inputs.append(given)
            else:
                yield [case], [given]
        if names:
            yield names, inputs

    def network_input(self, archive: Archive, case: str, alter: Alter | None = None) -> NetworkInput:
        """A case as the network sees it; ``alter`` as in ``predict_cases``.

        Raises:
            UserError: more or fewer scans than the segmenter has channels.
        """
        self.check_case(archive, case)
        row = archive.cases[case]
        channels = [archive_channel(archive, key, self.card.intensity) for key in row.scans]
        if alter is not None:
            channels = [alter(archive.scans[k], c) for k, c in zip(row.scans, channels, strict=True)]
        return self._input(channels)

    def check_case(self, archive: Archive, case: str) -> None:
        """See that a case has the channels that the segmenter takes, each of a modality that it knows.

        Raises:
            UserError: it does not.
        """
        row = archive.cases[case]
        self._check_channels(len(row.scans), f"case {case}")
        for key in row.scans:
            policy_for(self.card.intensity, archive.scans[key].modality)

    # -- files -----------------------------------------------------------------------------------------------

    def predict_nifti(
        self, paths: Sequence[Path], *, modality: str | None = None, probabilities: bool = False
    ) -> FilePrediction:
        """Prediction of one case, a file per channel in the card's order, on the grid of the first file.

        Args:
            paths: the files.
            modality: of the files of a segmenter of one channel; None: that of the card.
            probabilities: keep those of every class.

        Raises:
            BadScan: a file that is no usable 3D image.
            UserError: more or fewer files than the segmenter has channels, a channel that does not overlap the first,
                or a modality that must be stated.
        """
        self._check_channels(len(paths), paths[0].name if paths else "no file")
        modalities = self._modalities(modality)
        volumes = [nifti.read_nifti(path, allow_constant=True) for path in paths]
        grid = self._network_grid(volumes[0].array.shape, volumes[0].affine_44)
        channels = [
            self._file_channel(v, modality, *grid) for v, modality in zip(volumes, modalities, strict=True)
        ]
        self._check_overlap(paths, channels)
        given = self._input(channels)
        (found,) = self._probabilities([given], [paths[0].name])
        first = volumes[0]
        prediction = self._to_grid(
            found, given.affine_44, first.array.shape, first.affine_44, keep=probabilities
        )
        return FilePrediction(prediction, first.original)

    def _modalities(self, stated: str | None) -> tuple[str, ...]:
        """The modality of each channel of a file."""
        if stated is not None:
            if self.card.channels_in > 1:
                raise UserError("modality is for a segmenter of one channel; the card names those of several")
            policy_for(self.card.intensity, stated)
            return (stated,)
        if self.card.other_modalities:
            choices = sorted({*self.card.modalities, *self.card.other_modalities})
            raise UserError(
                f"the segmenter was trained on scans of {' and '.join(choices)}: state which these are by modality"
                f" (--modality {choices[0]})"
            )
        return self.card.modalities

    def _check_overlap(self, paths: Sequence[Path], channels: Sequence[Channel]) -> None:
        """See that every channel shows something of the first one's field of view; a constant one is told."""
        for path, channel in zip(paths, channels, strict=True):
            if len(paths) > 1 and channel.valid is not None and not channel.valid.any():
                raise UserError(
                    f"{path.name} has no data on the grid of {paths[0].name}: another place in space, or another"
                    " patient's scan"
                )
            if len(paths) > 1 and _empty(channel.array_DHW, channel.valid):
                logger.warning("%s holds one constant value: its channel says nothing", path.name)

    def _file_channel(
        self, volume: nifti.Volume, modality: str, shape: Triple, affine_44: np.ndarray
    ) -> Channel:
        """A file on the network's grid, its no-data region and statistics found the way ``prepare`` finds
        them.
        """
        policy = policy_for(self.card.intensity, modality)
        # a file does not state its unit; a network with an SUV window was trained on SUV
        unit = "HU" if modality == "CT" else "SUV" if policy.kind == "suv_window" else "raw"
        valid = volume.valid
        missing = intensity.no_data_region(volume.array, modality)
        if missing is not None:
            valid = ~missing if valid is None else valid & ~missing
        array, valid = resample_valid(volume.array, valid, volume.affine_44, shape, affine_44)
        if _empty(array, valid):
            return Channel(array, valid, affine_44, intensity.Linear(0.0, 0.0, 0.0, 1.0))
        statistics = intensity.statistics(array, valid, modality=modality, unit=unit)
        return Channel(array, valid, affine_44, intensity.linear(policy, statistics, unit=unit))

    # -- the way there and back ------------------------------------------------------------------------------

    def _check_channels(self, count: int, where: str) -> None:
        if count != self.card.channels_in:
            wanted = ", ".join(self.card.modalities)
            raise UserError(
                f"{where} has {count} channel(s), the segmenter takes {self.card.channels_in} ({wanted})"
            )

    def _network_grid(self, shape: Sequence[int], affine_44: np.ndarray) -> tuple[Triple, np.ndarray]:
        """The grid the network wants a scan on: its own one, or the card's spacing over the same field of
        view.
        """
        own = (int(shape[0]), int(shape[1]), int(shape[2]))
        if self.card.spacing_mm is None or close_spacing(spacing_of(affine_44), self.card.spacing_mm):
            return own, np.asarray(affine_44)
        return grid_for_spacing(own, affine_44, self.card.spacing_mm)

    def _input(self, channels: Sequence[Channel]) -> NetworkInput:
        """Normalise the channels on the first one's network grid; zero where a channel has no data."""
        first = channels[0]
        shape, affine_44 = self._network_grid(first.array_DHW.shape, first.affine_44)
        image_CDHW = np.zeros((len(channels), *shape), np.float32)
        empty, seen = True, np.zeros(shape, dtype=bool)
        for image_DHW, channel in zip(image_CDHW, channels, strict=True):
            array, valid = channel.array_DHW, channel.valid
            if not same_grid(array.shape, channel.affine_44, shape, affine_44):
                array, valid = resample_valid(array, valid, channel.affine_44, shape, affine_44)
            empty &= _empty(array, valid)
            image_DHW[...] = channel.line.apply(array)
            if valid is not None:
                image_DHW[~valid] = 0.0
            seen |= True if valid is None else valid
        return NetworkInput(image_CDHW, affine_44, empty, None if seen.all() else seen)

    def _to_grid(
        self,
        probabilities_KDHW: np.ndarray | None,
        affine_44: np.ndarray,
        shape: Sequence[int],
        to_affine_44: np.ndarray,
        *,
        keep: bool = False,
    ) -> Prediction:
        """The most probable class on a target grid; background beyond the network's field of view."""
        target = (int(shape[0]), int(shape[1]), int(shape[2]))
        if probabilities_KDHW is None:
            kept = np.zeros((len(self.classes), *target), np.float32) if keep else None
            if kept is not None:
                kept[0] = 1.0
            return Prediction(np.zeros(target, np.uint8), kept)
        if same_grid(probabilities_KDHW.shape[1:], affine_44, target, to_affine_44):
            label_DHW = probabilities_KDHW.argmax(axis=0).astype(np.uint8)
            return Prediction(label_DHW, probabilities_KDHW if keep else None)
        label_DHW, best_DHW, kept = np.zeros(target, np.uint8), None, []
        for k, volume_DHW in enumerate(probabilities_KDHW):
            moved_DHW = resample(volume_DHW, affine_44, target, to_affine_44, order=1, fill=float(k == 0))
            if best_DHW is None:
                best_DHW = moved_DHW.copy()
            else:
                wins = moved_DHW > best_DHW
                label_DHW[wins] = k
                np.maximum(best_DHW, moved_DHW, out=best_DHW)
            if keep:
                kept.append(moved_DHW)
        return Prediction(label_DHW, np.stack(kept) if keep else None)

    # -- the network -----------------------------------------------------------------------------------------

    def _probabilities(self, inputs: Sequence[NetworkInput], names: Sequence[str]) -> list[np.ndarray | None]:
        """Probabilities (K, D, H, W) of each input; None for an empty one, which is all background."""
        out: list[np.ndarray | None] = [None] * len(inputs)
        shared: dict[Triple, list[int]] = {}
        for i, (given, name) in enumerate(zip(inputs, names, strict=True)):
            if given.empty:
                logger.warning("%s is empty (no data, or one constant value): predicted as background", name)
                continue
            padded = self._one_pass_shape(given.image_CDHW.shape[1:])
            if padded is None:
                out[i] = self._by_windows(given)
            else:
                shared.setdefault(padded, []).append(i)
        for padded, members in shared.items():
            for i, probabilities in zip(
                members, self._together([inputs[m] for m in members], padded), strict=True
            ):
                out[i] = probabilities
        for given, probabilities_KDHW in zip(inputs, out, strict=True):
            if probabilities_KDHW is not None and given.seen_DHW is not None:
                probabilities_KDHW[:, ~given.seen_DHW] = 0.0
                probabilities_KDHW[0, ~given.seen_DHW] = 1.0
        return out

    def _one_pass_shape(self, shape: Sequence[int]) -> Triple | None:
        """The padded shape of a volume that goes through whole: at least the crop, as training padded it.

        None where that is too large, or where the network knows slices alone and the volume has several: each is then
        a window of its own.
        """
        if any(c == 1 < n for n, c in zip(shape, self.crop_size, strict=True)):
            return None
        d, h, w = (
            1 if c == 1 else max(c, math.ceil(n / s) * s)
            for n, c, s in zip(shape, self.crop_size, self.stride, strict=True)
        )
        return (d, h, w) if d * h * w <= self.whole_volume * math.prod(self.crop_size) else None

    def _together(self, inputs: Sequence[NetworkInput], padded: Triple) -> list[np.ndarray]:
        """Volumes of one padded shape in one forward pass, centred in the padding."""
        batch_BCDHW = np.zeros((len(inputs), len(inputs[0].image_CDHW), *padded), np.float32)
        boxes = []
        for one_CDHW, given in zip(batch_BCDHW, inputs, strict=True):
            starts = [(p - n) // 2 for p, n in zip(padded, given.image_CDHW.shape[1:], strict=True)]
            ends = [a + n for a, n in zip(starts, given.image_CDHW.shape[1:], strict=True)]
            box = (slice(None), *(slice(a, b) for a, b in zip(starts, ends, strict=True)))
            one_CDHW[box] = given.image_CDHW
            boxes.append(box)
        spacing_B3 = torch.tensor([spacing_of(g.affine_44) for g in inputs], dtype=torch.float32)
        logits_BKDHW = self._forward(torch.from_numpy(batch_BCDHW), spacing_B3)
        probabilities = logits_BKDHW.softmax(dim=1).cpu().numpy()
        return [np.ascontiguousarray(p[box]) for p, box in zip(probabilities, boxes, strict=True)]

    def _by_windows(self, given: NetworkInput) -> np.ndarray:
        """Overlapping windows, blended with Gaussian weights."""
        from monai.inferers.utils import sliding_window_inference

        image_BCDHW = torch.from_numpy(given.image_CDHW)[None]
        spacing_3 = torch.tensor(spacing_of(given.affine_44), dtype=torch.float32)
        stitched = 8 * len(self.classes) * given.image_CDHW[0].size
        with torch.inference_mode():
            logits_BKDHW = sliding_window_inference(
                image_BCDHW,
                roi_size=self.crop_size,
                sw_batch_size=self.window_batch,
                predictor=lambda window_BCDHW: self._forward(
                    window_BCDHW, spacing_3.expand(len(window_BCDHW), 3)
                ),
                overlap=self.overlap,
                mode="gaussian",
                sw_device=self.device,
                device=self.device if stitched <= self._stitch_bytes() else torch.device("cpu"),
            )
        assert isinstance(logits_BKDHW, Tensor)
        return logits_BKDHW[0].softmax(dim=0).cpu().numpy()

    def _stitch_bytes(self) -> int:
        """What stitched logits may take on the device: half of what is free there, at most."""
        if self.device.type != "cuda":
            return STITCH_ON_DEVICE_BYTES
        free, _ = torch.cuda.mem_get_info(self.device)
        free += torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return min(STITCH_ON_DEVICE_BYTES, free // 2)

    @torch.inference_mode()
    def _forward(self, image_BCDHW: Tensor, spacing_mm_B3: Tensor) -> Tensor:
        """Float32 logits; a lone small window runs twice on the CPU (``SLOW_ALONE_VOXELS``)."""
        small = image_BCDHW[0, 0].numel() <= SLOW_ALONE_VOXELS
        alone = len(image_BCDHW) == 1 and small and self.device.type == "cpu" and self.precision == "fp32"
        if alone:
            image_BCDHW, spacing_mm_B3 = image_BCDHW.expand(2, -1, -1, -1, -1), spacing_mm_B3.expand(2, 3)
        with autocast(self.device, self.precision):
            logits_BKDHW = self._mean_of_flips(image_BCDHW.to(self.device), spacing_mm_B3.to(self.device))
        return logits_BKDHW[:1] if alone else logits_BKDHW

    def _mean_of_flips(self, image_BCDHW: Tensor, spacing_mm_B3: Tensor) -> Tensor:
        total: Tensor | None = None
        for axes in self._flips:
            logits_BKDHW = self.segmenter(image_BCDHW.flip(axes), spacing_mm_B3).float().flip(axes)
            total = logits_BKDHW if total is None else total + logits_BKDHW
        assert total is not None
        return total / len(self._flips)


def largest_stride(strides: Sequence[Triple]) -> Triple:
    """Per axis, the largest stride of a pyramid."""
    d, h, w = (max(axis) for axis in zip(*strides, strict=True))
    return d, h, w


def _empty(array_DHW: np.ndarray, valid_DHW: np.ndarray | None) -> bool:
    seen = array_DHW if valid_DHW is None else array_DHW[valid_DHW]
    return seen.size == 0 or bool(seen.min() == seen.max())
