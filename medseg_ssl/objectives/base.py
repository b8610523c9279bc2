"""The contract of an objective: everything a training method is, and nothing of devices, optimizers or logging."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from medseg_ssl.config import Record
from medseg_ssl.nets.decoders.base import Decoder
from medseg_ssl.nets.encoders.base import Encoder
from medseg_ssl.nets.teacher import Teacher
from medseg_ssl.types import Batch, Facts, Template, ViewPlan


def still_parameters(objective: nn.Module) -> set[str]:
    """Names of the parameters that no step changes: those that are frozen, but for a teacher's, which follow."""
    following = {
        f"{name}.{inner}"
        for name, module in objective.named_modules()
        if isinstance(module, Teacher)
        for inner, _ in module.named_parameters()
    }
    return {name for name, p in objective.named_parameters() if not p.requires_grad} - following


class ObjectiveConfig(Record):
    """Options every objective has; each file's ``Config`` adds its own."""


class StepOutput(NamedTuple):
    """Result of one forward pass (a NamedTuple, since Fabric rejects frozen dataclasses as module outputs).

    Attributes:
        loss: scalar float32 to be minimised.
        logs: detached scalars by name; the loop writes them as ``train/<name>``.
        features_BE: detached pooled features of the encoder, for the rank and collapse alarm; None without any.
    """

    loss: Tensor
    logs: dict[str, Tensor]
    features_BE: Tensor | None = None


class Exported(NamedTuple):
    """What a trained objective ships: live modules, student or teacher as the method knows best.

    Attributes:
        encoder: always.
        decoder: where the objective trained one.
        head: class heads (a ``ModuleList``, finest level first) of a supervised objective.
        untrained: beginnings of the names of the encoder's parameters that this objective does not train.
    """

    encoder: Encoder
    decoder: Decoder | None
    head: nn.Module | None = None
    untrained: tuple[str, ...] = ()


class Objective(nn.Module, ABC):
    """A training method.

    Subclasses are final and hold a nested ``Config``. Random draws (hidden regions, sampled points) are made with
    ``medseg_ssl.draws`` from (seed, global sample index, purpose), never from global state.
    """

    Config: ClassVar[type[ObjectiveConfig]]
    needs: ClassVar[type[Encoder]] = Encoder
    may_recompute: ClassVar[bool] = True
    """Whether parts of the encoder may be called again in the backward pass (``train.recompute``)."""
    may_compile: ClassVar[bool] = True
    """Whether ``train.compile`` reaches the encoder; an objective that follows its layers one by one runs eagerly."""
    takes_templates: ClassVar[bool] = False
    """Whether ``use_templates`` is to be called before training."""
    needs_previous: ClassVar[bool] = False
    """Whether training goes on from a segmenter (``finetune --continue-from``)."""

    def __init__(self, config: ObjectiveConfig, encoder: Encoder, facts: Facts) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder
        self.facts = facts

    @staticmethod
    @abstractmethod
    def views(config: Any) -> ViewPlan:
        """The views this method asks the loader for."""

    @staticmethod
    def relations(config: Any) -> tuple[str, ...]:
        """Relations of pairs this method can use; empty for methods that use single scans."""
        return ()

    @abstractmethod
    def forward(self, batch: Batch, progress: float) -> StepOutput:
        """Loss of a batch; every schedule is a function of ``progress`` in [0, 1]."""

    def use_templates(self, templates: Mapping[str, Template], *, seed: int) -> None:
        """Take the templates of the training scans by modality: once, before training, if ``takes_templates``."""

    def compile_networks(self) -> None:
        """Compile what takes tensors, not batches: every encoder and decoder, teachers' too."""
        own = dict(self.named_children()).get("decoder")  # may be no pyramid's
        for part in list(self.modules()):
            if isinstance(part, Encoder):
                part.compile_entrances()
            elif isinstance(part, Decoder) or part is own:
                part.compile()

    def begin(self, kept: Sequence[int] = ()) -> None:
        """Copy what is to be copied of the networks: they hold the weights that fine-tuning starts from.

        Called once before fine-tuning, also where a run continues (what a checkpoint holds is loaded after it).

        Args:
            kept: classes that a segmenter knew from which the networks were taken; empty without one.
        """

    def after_step(self, progress: float) -> None:
        """Update teachers and queues after the optimizer stepped."""

    def asks(self, encoder: Any, image_BCDHW: Tensor) -> Any:
        """What a step asks of the encoder for a view: all of its maps, or the tokens it computes. For counting.

        Args:
            encoder: this objective's, or a copy of it without content.
            image_BCDHW: a crop.
        """
        return encoder(image_BCDHW)

    @abstractmethod
    def export(self) -> Exported:
        """The modules worth keeping."""

    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """Pictures for the recorder: name to a float tensor (B, D, H, W) or (B, C, D, H, W)."""
        return {}
