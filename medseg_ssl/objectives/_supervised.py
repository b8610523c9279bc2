"""What objectives have in common that train a segmenter on labels and on something more.

``Supervised`` holds the networks and the labeled crop; ``SemiSupervised`` adds an unlabeled crop, the weight of what is
learned from it, and the moving average of the network that may judge it (mean teacher, arXiv 1703.01780).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field
from torch import Tensor, nn

from medseg_ssl import schedules
from medseg_ssl.config import Block, ConfigError, MirrorAxes
from medseg_ssl.nets.decoders.base import decoder_for
from medseg_ssl.nets.encoders.base import Encoder
from medseg_ssl.nets.reach import unread
from medseg_ssl.nets.segmentation_loss import SegmentationLoss
from medseg_ssl.nets.segmenter import Segmenter
from medseg_ssl.nets.teacher import Teacher, rising_momentum
from medseg_ssl.objectives.base import Exported, Objective, ObjectiveConfig
from medseg_ssl.types import Batch, Facts, Triple, View, ViewPlan, ViewSpec


class SupervisedConfig(ObjectiveConfig):
    """Networks, crop and supervised loss.

    Attributes:
        size: crop (D, H, W), unlabeled ones too.
        augment: augmentation of image and label of the labeled crop.
        mirror_axes: axes (0 superior-inferior, 1 anterior-posterior, 2 left-right) mirrored at random.
        loss: on labels, pseudo-labels too.
        deep_supervision: also train the heads of coarser levels on the labels.
        decoder: block on the shelf of decoders.
    """

    size: Triple = (64, 64, 64)
    augment: str = "segmentation"
    mirror_axes: MirrorAxes = ()
    loss: SegmentationLoss = SegmentationLoss()
    deep_supervision: bool = True
    decoder: Block = Field(default_factory=lambda: Block(name="unet"))


class Supervised(Objective):
    """Encoder, decoder and class heads, of which labels teach a part."""

    config: SupervisedConfig

    def __init__(self, config: SupervisedConfig, encoder: Encoder, facts: Facts) -> None:
        super().__init__(config, encoder, facts)
        if len(facts.classes) < 2:
            name = type(self).__module__.rsplit(".", 1)[-1]
            raise ConfigError(f"{name} needs an archive with labels; this one has no classes")
        self.decoder = decoder_for(encoder, config.decoder)
        self._unread = unread(encoder, self.decoder)  # now: fine-tuning may put adapters into the encoder
        levels = self.decoder.channels_out if config.deep_supervision else self.decoder.channels_out[:1]
        self.heads = nn.ModuleList(nn.Conv3d(c, len(facts.classes), kernel_size=1) for c in levels)

    @staticmethod
    def views(config: Any) -> ViewPlan:
        """One labeled crop."""
        spec = ViewSpec(
            count=1, size=config.size, augment=config.augment, labeled=True, mirror_axes=config.mirror_axes
        )
        return {"labeled": spec}

    def student(self) -> Segmenter:
        """The live networks as one module."""
        return Segmenter(self.encoder, self.decoder, len(self.facts.classes), heads=self.heads)

    def on_labels(self, logits: Sequence[Tensor], view: View) -> tuple[Tensor, dict[str, Tensor]]:
        """The supervised loss and what is logged of it.

        Args:
            logits: class scores (B, K, D_i, H_i, W_i) of every supervised level, finest first.
            view: the labeled crop.
        """
        total, voxel, region = self.config.loss.of_view(logits, view)
        return total, {"voxel_loss": voxel.detach(), "region_loss": region.detach()}

    def export(self) -> Exported:
        """The student's networks, as ``segmentation`` ships them; ``train.ema`` averages them."""
        return Exported(self.encoder, self.decoder, self.heads, self._unread)

    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """Input, truth and prediction of the labeled crop."""
        view = batch.views["labeled"][0]
        assert view.label_BDHW is not None
        return {
            "image": view.image_BCDHW[:, 0].float(),
            "truth": view.label_BDHW,
            "prediction": self.student()(view.image_BCDHW, view.spacing_mm_B3).argmax(dim=1),
        }


class SemiSupervisedConfig(SupervisedConfig):
    """What is learned from scans without labels, and how much it counts.

    Attributes:
        unlabeled_augment: what the student sees of the unlabeled crop; what it is to say of it comes from the crop
            without the intensities' part.
        momentum: of the teacher, once it has risen; it rises from 0 with the weight, since an average of the first
            steps is worth little.
        weight: of the loss on unlabeled crops, once it has risen.
        ramp: shares of the run at which that loss begins to count and at which it counts fully.
    """

    unlabeled_augment: Literal["weak", "strong"] = "strong"
    momentum: float = Field(default=0.99, ge=0.0, lt=1.0)
    weight: float = Field(default=1.0, ge=0.0)
    ramp: schedules.Ramp


class SemiSupervised(Supervised):
    """Labels on a few scans, and the answers of a network (``judge``) on all training scans.

    Attributes:
        teacher: the moving average of the networks; None where they judge themselves.
    """

    config: SemiSupervisedConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(
        self, config: SemiSupervisedConfig, encoder: Encoder, facts: Facts, *, with_teacher: bool = True
    ) -> None:
        super().__init__(config, encoder, facts)
        self.teacher = Teacher(self.student()) if with_teacher else None

    @staticmethod
    def views(config: SemiSupervisedConfig) -> ViewPlan:
        """A labeled crop, and one of any training scan whose label nobody reads."""
        unlabeled = ViewSpec(
            count=1,
            size=config.size,
            augment=config.unlabeled_augment,
            pool="all",
            mirror_axes=config.mirror_axes,
        )
        return {**Supervised.views(config), "unlabeled": unlabeled}

    def judge(self) -> Segmenter:
        """The network that says what an unlabeled crop shows."""
        return self.student() if self.teacher is None else self.teacher.network

    def weight(self, progress: float) -> float:
        """Of the loss on unlabeled crops."""
        return self.config.weight * schedules.ramp(progress, self.config.ramp)

    def begin(self, kept: Sequence[int] = ()) -> None:
        """Let the teacher begin as the student does, where there is one."""
        self.teacher = None if self.teacher is None else Teacher(self.student())

    def after_step(self, progress: float) -> None:
        """Let the teacher follow, where there is one."""
        if self.teacher is not None:
            risen = schedules.ramp(progress, (0.0, self.config.ramp[1]))
            self.teacher.follow(self.student(), momentum=rising_momentum(self.config.momentum, risen))
