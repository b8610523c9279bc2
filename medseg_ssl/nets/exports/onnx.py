"""A segmenter as ONNX: input ``image`` (B, C, D, H, W), output ``logits`` (B, K, D, H, W), float32.

Through ``torch.export``: the older exporter cannot express a group norm whose number of groups is a size, as our
instance norm on a CPU is, once sizes may vary.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from medseg_ssl.config import UserError
from medseg_ssl.nets.encoder_file import Loaded
from medseg_ssl.nets.exports._graphs import AtSpacing, GraphConfig, beside, check, example
from medseg_ssl.nets.exports.base import Export, Exported

if TYPE_CHECKING:
    import onnx

LARGEST = 2**31
"""Bytes that one ONNX file can hold."""


class Onnx(Export):
    """A segmenter for onnxruntime and its kin; its card lies beside it and, as ``card``, in its metadata."""

    class Config(GraphConfig):
        """Options of a graph."""

    beside: ClassVar[tuple[str, ...]] = (".json",)
    config: Config

    def make(self, loaded: Loaded) -> Exported:
        """The graph.

        Raises:
            UserError: the file holds an encoder, an extra is missing, the network is too large for one file, or the
                graph does not give the segmenter's output.
        """
        module = AtSpacing(loaded, what="onnx", spacing_mm=self.config.spacing_mm)
        image = example(loaded.card, self.config)
        size = sum(p.numel() * p.element_size() for p in module.parameters())
        if size > 0.95 * LARGEST:
            raise UserError(
                f"{size / 2**30:.1f} GiB of weights are more than one ONNX file holds; take torchscript"
            )
        try:
            import onnx
            import onnxruntime
        except ImportError as error:
            raise UserError(
                f"onnx needs the extra 'export' (pip install 'medseg-ssl[export]'): {error}"
            ) from error
        model = _exported(module, image, dynamic=self.config.dynamic)
        card = beside(loaded.card)
        onnx.helper.set_model_props(model, {"card": card[".json"].decode()})
        content = model.SerializeToString()
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])

        def run(image_BCDHW: Tensor) -> Tensor:
            return torch.from_numpy(session.run(["logits"], {"image": image_BCDHW.numpy()})[0])

        report = check(module, run, image, dynamic=self.config.dynamic, where="onnxruntime")
        return Exported(content, card, (*report, f"opset {model.opset_import[0].version}"))


def _exported(module: AtSpacing, image_BCDHW: Tensor, *, dynamic: bool) -> onnx.ModelProto:
    free = torch.export.Dim.AUTO
    shapes = ({0: free, 2: free, 3: free, 4: free},) if dynamic else None
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        # the fused attention of a CPU leaves its output in an order in memory that the graph's own attention does not
        with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
            warnings.simplefilter("ignore")  # of other people's deprecations; the output is compared
            # an example of one sample would make "one" part of the graph where the batch may vary
            example = image_BCDHW.repeat(2, 1, 1, 1, 1) if dynamic else image_BCDHW
            program = torch.onnx.export(
                module,
                (example,),
                input_names=["image"],
                output_names=["logits"],
                dynamic_shapes=shapes,
                custom_translation_table={torch.ops.aten._adaptive_avg_pool3d.default: _adaptive_pool},
                dynamo=True,
                verbose=False,
            )
    except Exception as error:  # torch.export and onnxscript raise what they like
        reason = " ".join((str(error.__cause__) if error.__cause__ else str(error)).split())[:300]
        hint = "; export without dynamic" if dynamic else ""
        raise UserError(f"torch.onnx cannot export this segmenter: {reason}{hint}") from error
    finally:
        logger.setLevel(before)
    assert program is not None
    return program.model_proto


def _adaptive_pool(self: Any, output_size: Sequence[int]) -> Any:
    """Adaptive average pooling (as in UPerNet), which ONNX lacks, as one product with a matrix of means an axis.

    Raises:
        ValueError: sizes that vary.
    """
    import onnx
    from onnxscript import opset18

    if any(not isinstance(n, int) for n in self.shape[2:]):
        raise ValueError("adaptive pooling needs sizes that do not vary")
    means = []
    for cells, voxels in zip(output_size, self.shape[2:], strict=True):
        place = torch.arange(voxels)
        rows = [
            (place >= cell * voxels // cells) & (place < -(-(cell + 1) * voxels // cells))
            for cell in range(cells)
        ]
        inside = torch.stack(rows).float()
        matrix = onnx.numpy_helper.from_array((inside / inside.sum(1, keepdim=True)).numpy())
        means.append(opset18.Constant(value=matrix))
    return opset18.Einsum(self, *means, equation="bcdhw,xd,yh,zw->bcxyz")
