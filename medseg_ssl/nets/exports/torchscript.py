"""A segmenter as TorchScript: ``torch.jit.load`` runs it in Python and C++ without this package."""

from __future__ import annotations

import io
import warnings
from typing import Any, ClassVar

import torch

from medseg_ssl.config import UserError
from medseg_ssl.nets.encoder_file import Loaded
from medseg_ssl.nets.exports._graphs import AtSpacing, GraphConfig, beside, check, example
from medseg_ssl.nets.exports.base import Export, Exported


class TorchScript(Export):
    """A traced segmenter; its card lies beside it and, as ``card.json``, inside."""

    class Config(GraphConfig):
        """Options of a graph."""

    beside: ClassVar[tuple[str, ...]] = (".json",)
    config: Config

    def make(self, loaded: Loaded) -> Exported:
        """The traced segmenter.

        Raises:
            UserError: the file holds an encoder, or the trace does not give the segmenter's output.
        """
        module = AtSpacing(loaded, what="torchscript", spacing_mm=self.config.spacing_mm)
        image = example(loaded.card, self.config)
        try:
            with torch.no_grad(), warnings.catch_warnings():
                # tracing warns of every branch on a size, and of its own age; the output is compared below
                warnings.simplefilter("ignore")
                traced: Any = torch.jit.trace(module, (image,), check_trace=False)
                _follow_the_image(traced.graph)
        except (RuntimeError, TypeError) as error:
            raise UserError(
                f"the segmenter cannot be traced: {' '.join(str(error).split())[:200]}"
            ) from error
        buffer, card = io.BytesIO(), beside(loaded.card)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.save(traced, buffer, _extra_files={"card.json": card[".json"]})
            buffer.seek(0)
            opened = torch.jit.load(buffer)

        def run(image_BCDHW: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                return opened(image_BCDHW)

        report = check(module, run, image, dynamic=self.config.dynamic, where="torch.jit")
        return Exported(buffer.getvalue(), card, report)


def _follow_the_image(graph: Any) -> None:
    """Put the image's device in place of the one that a trace wrote down for positions and weights made on the way."""
    torch._C._jit_pass_inline(graph)
    _, image = graph.inputs()
    kind = torch._C.DeviceObjType
    device = graph.create("prim::device", [image], 1)
    device.output().setType(kind.get())
    graph.prependNode(device)
    for constant in graph.findAllNodes("prim::Constant"):
        if isinstance(constant.output().type(), kind):
            constant.output().replaceAllUsesWith(device.output())
