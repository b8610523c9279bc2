"""Pictures of what voxels look like to an encoder: the first three principal components of their features as colours.

Components are those of body voxels of all the scans together, so that one colour means one thing in every scan, subject
and modality; as DINOv2 shows its patches (arXiv 2304.07193). A level of the pyramid counts as its channels vary.
Attention of single tokens is not shown: encoders here have no hook for it, and components work for every one of them.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from pydantic import Field

from medseg_ssl.draws import numpy_generator
from medseg_ssl.evaluations._crops import check_encoder, few, levels_of, scans_by_modality
from medseg_ssl.evaluations.base import Evaluation, EvaluationConfig
from medseg_ssl.inference.frozen import FrozenEncoder, network_crop
from medseg_ssl.inference.inputs import crop_size_of, network_spacing
from medseg_ssl.types import Score, Triple

if TYPE_CHECKING:
    from medseg_ssl.data.archive import Archive

COLOURS = 3
ENDS = (1.0, 99.0)
"""Percentiles of a component over all scans that become 0 and 255."""


class FeaturePCA(Evaluation):
    """A picture per scan, and the share of the features' variance that it shows."""

    class Config(EvaluationConfig):
        """Which scans.

        Attributes:
            split: name of the archive's split.
            subset: which of its lists; ``all`` takes every subject.
            scans: scans in all, modalities in turn, each of another subject as far as possible.
            crop_size: voxels (D, H, W) of the crop in the middle of the body, at the encoder's spacing; its middle
                axial slice is shown. Null takes the size the encoder was trained on.
            levels: every level of the pyramid, or the deepest alone.
            voxels: body voxels per scan that the components are made of.
            seed: of these voxels.
        """

        split: str = "default"
        subset: Literal["train", "development", "test", "all"] = "development"
        scans: int = Field(default=6, ge=1)
        crop_size: Triple | None = None
        levels: Literal["all", "deepest"] = "all"
        voxels: int = Field(default=1000, ge=8)
        seed: int = 0

    config: Config
    sparing = MappingProxyType({"scans": 4})

    def run(self, model: FrozenEncoder, archive: Archive) -> Iterator[Score]:
        """Yield the share of variance of each of the three components, the pictures with the first.

        Raises:
            ConfigError: ``model`` is no encoder.
            UserError: no scan in the subset.
        """
        check_encoder(model, "feature_pca")
        shown = [self._look(model, archive, key) for key in self._scans(archive)]
        axes = Components.of(np.concatenate([look.drawn_NE for look in shown]))
        colours = axes.colours([look.slice_NE for look in shown])
        pictures = {
            look.name: picture_png(
                look.image_HW,
                np.where(look.body_HW[..., None], rgb_N3.reshape(*look.image_HW.shape, COLOURS), 0).astype(
                    np.uint8
                ),
                spacing_mm=look.spacing_mm,
            )
            for look, rgb_N3 in zip(shown, colours, strict=True)
        }
        for number, share in enumerate(axes.share_C):
            yield Score(
                f"variance/{number + 1}", float(share), "share", pictures=None if number else pictures
            )

    def _scans(self, archive: Archive) -> list[str]:
        by_modality = scans_by_modality(archive, self.config.split, self.config.subset)
        kinds = [few(archive, keys, self.config.scans) for keys in by_modality.values()]
        turns = [kind[turn] for turn in range(max(map(len, kinds))) for kind in kinds if turn < len(kind)]
        return turns[: self.config.scans]

    def _look(self, model: FrozenEncoder, archive: Archive, key: str) -> _Look:
        """Features of one scan: of drawn body voxels, and of the slice that is shown."""
        config, row = self.config, archive.scans[key]
        d, h, w = config.crop_size or crop_size_of(model.card)
        spacing_mm = network_spacing(model.card, row)
        factor = np.array(spacing_mm) / np.array(row.spacing_mm)
        middle = (np.array(row.foreground_box[0]) + np.array(row.foreground_box[1]) - 1) / 2
        start = middle - (np.array((d, h, w)) - 1) / 2 * factor
        crop = network_crop(archive, key, model.card, start=start, size=(d, h, w))
        body = np.flatnonzero(crop.body_DHW if crop.body_DHW.any() else np.ones_like(crop.body_DHW))
        rng = numpy_generator(config.seed, 0, f"feature pca:{row.content_hash}")
        drawn = np.sort(rng.choice(body, min(config.voxels, len(body)), replace=False))
        plane = np.arange(h * w) + d // 2 * h * w
        places_P3 = np.stack(np.unravel_index(np.concatenate([drawn, plane]), (d, h, w)), axis=1)
        (read,) = model.at_voxels(
            crop.image_DHW[None, None],
            [places_P3],
            spacing_mm=spacing_mm,
            levels=levels_of(model, config.levels),
            batch_size=1,
        )
        features_NE = read.cpu().numpy().astype(np.float64)
        return _Look(
            f"{row.modality}-{key}",
            features_NE[: len(drawn)],
            features_NE[len(drawn) :],
            crop.image_DHW[d // 2],
            crop.body_DHW[d // 2],
            (spacing_mm[1], spacing_mm[2]),
        )


class _Look(NamedTuple):
    """A scan as it is shown."""

    name: str
    drawn_NE: np.ndarray
    slice_NE: np.ndarray
    image_HW: np.ndarray
    body_HW: np.ndarray
    spacing_mm: tuple[float, float]


class Components(NamedTuple):
    """The first three principal components of standardised features.

    Attributes:
        share_C: of the variance.
        ends_C2: values that become 0 and 255.
    """

    mean_E: np.ndarray
    scale_E: np.ndarray
    axes_EC: np.ndarray
    share_C: np.ndarray
    ends_C2: np.ndarray

    @staticmethod
    def of(features_NE: np.ndarray) -> Components:
        """Components; the largest coefficient of each is positive, so that equal features have equal colours.

        Directions in which nothing varies are 0.
        """
        mean_E, spread_E = features_NE.mean(axis=0), features_NE.std(axis=0)
        moves_E = spread_E > 1e-6 * np.maximum(np.abs(features_NE).mean(axis=0), 1e-12)
        scale_E = np.where(moves_E, 1 / np.where(moves_E, spread_E, 1.0), 0.0)
        x_NE = (features_NE - mean_E) * scale_E
        values_E, vectors_EE = np.linalg.eigh(x_NE.T @ x_NE / len(x_NE))
        first = np.argsort(values_E)[::-1][:COLOURS]
        value_C, axes_EC = np.maximum(values_E[first], 0), vectors_EE[:, first]
        axes_EC = axes_EC * np.sign(np.take_along_axis(axes_EC, np.abs(axes_EC).argmax(axis=0)[None], axis=0))
        total = max(float(values_E.sum()), 1e-12)
        live_C = value_C > 1e-9 * total
        axes_EC = np.pad(axes_EC * live_C, ((0, 0), (0, COLOURS - len(first))))
        share_C = np.pad(value_C * live_C / total, (0, COLOURS - len(first)))
        ends_C2 = np.percentile(x_NE @ axes_EC, ENDS, axis=0).T
        return Components(mean_E, scale_E, axes_EC, share_C, ends_C2)

    def colours(self, parts: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Colours (N, 3), uint8, of the features of each part; the middle grey where a component does not vary."""
        low_C, high_C = self.ends_C2.T
        width_C = high_C - low_C
        flat_C = width_C <= 1e-12
        out = []
        for features_NE in parts:
            value_NC = ((features_NE - self.mean_E) * self.scale_E) @ self.axes_EC
            value_NC = np.where(flat_C, 0.5, (value_NC - low_C) / np.where(flat_C, 1.0, width_C))
            out.append(np.rint(np.clip(value_NC, 0, 1) * 255).astype(np.uint8))
        return out


def picture_png(
    image_HW: np.ndarray, rgb_HW3: np.ndarray, *, spacing_mm: tuple[float, float], longest: int = 320
) -> bytes:
    """The slice in grey and beside it in colours, as PNG in radiological orientation.

    Args:
        image_HW: rows towards anterior, columns towards the patient's right.
        rgb_HW3: uint8 colours of its voxels.
        spacing_mm: pixel size (H, W).
        longest: pixels of the longer side of each.
    """
    from PIL import Image

    low, high = np.percentile(image_HW, (0.5, 99.5))
    grey_HW = (np.clip((image_HW - low) / max(high - low, 1e-6), 0, 1) * 255).astype(np.uint8)
    both = [np.repeat(grey_HW[..., None], COLOURS, axis=2), rgb_HW3]
    height_mm, width_mm = (n * s for n, s in zip(image_HW.shape, spacing_mm, strict=True))
    scale = longest / max(height_mm, width_mm)
    size = (max(1, round(width_mm * scale)), max(1, round(height_mm * scale)))
    tiles = [
        np.asarray(
            Image.fromarray(np.ascontiguousarray(tile[::-1, ::-1])).resize(size, Image.Resampling.NEAREST)
        )
        for tile in both
    ]
    buffer = io.BytesIO()
    Image.fromarray(np.concatenate(tiles, axis=1)).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
