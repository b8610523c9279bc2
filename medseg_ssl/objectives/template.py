"""Which place of the anatomy does a voxel show? Each names its place in a template made of the unlabeled scans.

The training scans are registered to their common mean (``data/groupwise.py``); from a single augmented crop the network
then tells every voxel's place there, as a soft choice among sites a few millimetres apart. Scans teach one another: one
place looks different in each, so what stays is anatomy. Kin: self-supervised anatomical embeddings (arXiv 2012.02383)
and correspondence between subjects (GVSL, arXiv 2303.00874), which align in the network; here the registration is done
once, before training. Encoder and decoder ship; the projection and the sites stay behind.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from medseg_ssl import draws
from medseg_ssl.config import Block, UserError
from medseg_ssl.nets.contrast import similarities
from medseg_ssl.nets.correspondence import read_features, transform, usable_first
from medseg_ssl.nets.decoders.base import decoder_for
from medseg_ssl.nets.encoders.base import Encoder
from medseg_ssl.nets.heads import pool
from medseg_ssl.nets.reach import unread
from medseg_ssl.objectives.base import Exported, Objective, ObjectiveConfig, StepOutput
from medseg_ssl.types import Batch, Facts, Template, Triple, View, ViewPlan, ViewSpec


class TemplatePlaces(Objective):
    """Voxel embeddings that tell the place in a groupwise template. Suffixes: N points, P sites, S scans."""

    class Config(ObjectiveConfig):
        """Options.

        Attributes:
            size: crop (D, H, W).
            augment: augmentation of the crop.
            points: voxels per crop that enter the loss.
            embedding: length of a voxel's embedding.
            site_voxels: template voxels between neighbouring sites.
            blur_voxels: standard deviation, in template voxels, of the target around the true place: registration is
                not exact.
            temperature: of the choice among the sites.
            decoder: block on the shelf of decoders.
        """

        size: Triple = (64, 64, 64)
        augment: str = "strong"
        points: int = Field(1024, ge=1)
        embedding: int = Field(32, ge=2)
        site_voxels: int = Field(3, ge=1)
        blur_voxels: float = Field(1.6, gt=0.0)
        temperature: float = Field(0.07, gt=0.0)
        decoder: Block = Field(default_factory=lambda: Block(name="hypercolumn"))

    config: Config
    takes_templates = True

    def __init__(self, config: Config, encoder: Encoder, facts: Facts) -> None:
        super().__init__(config, encoder, facts)
        self.decoder = decoder_for(encoder, config.decoder)
        self.project = nn.Linear(self.decoder.channels_out[0], config.embedding)
        self.sites = nn.ParameterDict()
        self._places: dict[str, _Places] = {}
        self._of_scan: dict[str, tuple[str, int]] = {}

    @staticmethod
    def views(config: Config) -> ViewPlan:
        """One crop."""
        return {"crop": ViewSpec(count=1, size=config.size, augment=config.augment)}

    def use_templates(self, templates: Mapping[str, Template], *, seed: int) -> None:
        """Make a site every few voxels of each modality's template where at least half of the scans show body.

        Raises:
            UserError: a template without such a place.
        """
        for modality, template in sorted(templates.items()):
            places = _Places(template, every=self.config.site_voxels)
            if not len(places.site_P3):
                raise UserError(f"the template of {modality} has no voxel that half of its scans show")
            generator = draws.torch_generator(seed, 0, f"template/sites/{modality}")
            start = torch.randn(len(places.site_P3), self.config.embedding, generator=generator)
            self.sites[modality] = nn.Parameter(start)
            self._places[modality] = places
            self._of_scan |= {key: (modality, number) for number, key in enumerate(template.keys)}

    def forward(self, batch: Batch, progress: float) -> StepOutput:
        """Cross-entropy between each point's site scores and the Gaussian around its true place."""
        view = batch.views["crop"][0]
        maps = self.encoder(view.image_BCDHW, view.spacing_mm_B3)
        features = self.decoder(maps)[0]
        index_BN3, usable_BN = self._points(view, batch)
        read_BNC = read_features(features, index_BN3, self.decoder.strides_out[0])
        embedded_BNE = functional.normalize(self.project(read_BNC).float(), dim=-1)
        losses, errors, counted = [], [], []
        for i, scans in enumerate(batch.scans_B):
            if scans[0] not in self._of_scan:
                continue  # nothing but air, or the only one of its modality: it has no place and teaches nothing
            modality, number = self._of_scan[scans[0]]
            places, sites_PE = (
                self._places[modality],
                functional.normalize(self.sites[modality].float(), dim=-1),
            )
            place_N3, seen_N = places.of(number, view.affine_B44[i], index_BN3[i])
            weight_N = (usable_BN[i] & seen_N).float()
            # without a matrix product, which a GPU may round to TF32: three digits are too few for half a voxel
            apart_NP = torch.cdist(
                place_N3, places.on(place_N3.device), compute_mode="donot_use_mm_for_euclid_dist"
            )
            target_NP = torch.softmax(-0.5 * (apart_NP / self.config.blur_voxels) ** 2, dim=1)
            scores_NP = similarities(embedded_BNE[i], sites_PE) / self.config.temperature
            losses.append((-(target_NP * scores_NP.log_softmax(dim=1)).sum(dim=1) * weight_N).sum())
            nearest_N = apart_NP.gather(1, scores_NP.detach().argmax(dim=1, keepdim=True))[:, 0]
            errors.append((nearest_N * places.spacing_mm * weight_N).sum())
            counted.append(weight_N.sum())
        if not losses:
            return StepOutput(0.0 * embedded_BNE.sum(), {}, pool(maps[-1], view.valid_BDHW).detach())
        total = torch.stack(counted).sum().clamp(min=1.0)
        loss = torch.stack(losses).sum() / total
        logs = {"place_error_mm": torch.stack(errors).sum().detach() / total}
        return StepOutput(loss, logs, pool(maps[-1], view.valid_BDHW).detach())

    def export(self) -> Exported:
        """Encoder and decoder."""
        return Exported(self.encoder, self.decoder, untrained=unread(self.encoder, self.decoder))

    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """The crop."""
        return {"image": batch.views["crop"][0].image_BCDHW[:, 0].float()}

    def _points(self, view: View, batch: Batch) -> tuple[Tensor, Tensor]:
        """Voxels (B, N, 3) of each crop, body first, and which of them are body; drawn on the CPU for every device."""
        size, device = view.foreground_BDHW.shape[1:], view.image_BCDHW.device
        voxels = size[0] * size[1] * size[2]
        count = min(self.config.points, voxels)
        chosen, usable = [], []
        for i, sample in enumerate(batch.sample_index_B.tolist()):
            generator = draws.torch_generator(batch.seed, sample, "template/points")
            # candidates with repetition: an order of all voxels of a large crop would cost more than the loss
            order = torch.randint(voxels, (8 * count,), generator=generator).to(device, non_blocking=True)
            body = view.foreground_BDHW[i].flatten()[order]
            first = usable_first(body)[:count]
            chosen.append(torch.stack(torch.unravel_index(order[first], size), dim=-1).float())
            usable.append(body[first])
        return torch.stack(chosen), torch.stack(usable)


class _Places:
    """A template's sites, and the place of a scan's points among them."""

    def __init__(self, template: Template, *, every: int) -> None:
        self.spacing_mm = template.spacing_mm
        self._to_lattice_S44, self._place_S3DHW = template.to_lattice_S44, template.place_S3DHW
        self._shown_DHW = template.weight_DHW >= 0.5
        axes = [torch.arange(every // 2, n, every) for n in template.weight_DHW.shape]
        grid_P3 = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3)
        self.site_P3 = grid_P3[self._shown_DHW[tuple(grid_P3.T)]].float()

    def on(self, device: torch.device) -> Tensor:
        """Sites (P, 3) in template voxels, on a device."""
        if self.site_P3.device != device:
            self.site_P3 = self.site_P3.to(device, non_blocking=True)
            self._shown_DHW = self._shown_DHW.to(device, non_blocking=True)
        return self.site_P3

    def of(self, number: int, affine_44: Tensor, index_N3: Tensor) -> tuple[Tensor, Tensor]:
        """Template voxels (N, 3) of a crop's voxels, and whether at least half of the scans show body there."""
        device = index_N3.device
        self.on(device)
        # lattices stay on the CPU: of a large archive all of them would fill a GPU
        place_3DHW = self._place_S3DHW[number].to(device, non_blocking=True)
        to_lattice_44 = self._to_lattice_S44[number].to(device, non_blocking=True) @ affine_44.double()
        lattice_N3 = transform(to_lattice_44[None], index_N3[None])[0]
        limit_3 = torch.tensor(place_3DHW.shape[1:], dtype=torch.float64).to(device, non_blocking=True) - 1
        inside_N = ((lattice_N3 >= -0.5) & (lattice_N3 <= limit_3 + 0.5)).all(dim=1)
        place_N3 = read_features(place_3DHW[None], lattice_N3[None].float(), (1, 1, 1))[0]
        top_3 = torch.tensor(self._shown_DHW.shape).to(device, non_blocking=True) - 1
        nearest_N3 = place_N3.round().long()
        there_N = ((nearest_N3 >= 0) & (nearest_N3 <= top_3)).all(dim=1)
        shown_N = self._shown_DHW[tuple(nearest_N3.clamp(min=torch.zeros_like(top_3), max=top_3).T)]
        return place_N3, inside_N & there_N & shown_N
