"""A training step of a network: ours next to a peer's, interleaved, as a ratio of medians.

Both sides take 64³ crops, batch 2, three classes, cross-entropy and Dice (with deep supervision for `resenc`), SGD with
Nesterov momentum, the same data type and number of threads, each in a process of its own so that neither uses the
other's memory pages. Networks (--network), the same architecture on both sides but for `vit`:

    resenc   residual U-Net of 9.7 M parameters; nnU-Net's ResidualEncoderUNet, built by nnunetv2 where the interpreter
             named with --peer-python (or MEDSEG_PEER_PYTHON) has it, else from dynamic-network-architectures
    primus   Primus-S with its decoder of patches; Primus of dynamic-network-architectures
    swin     Swin UNETR of 24 features; MONAI's SwinUNETR
    vit      a transformer of 6 blocks of 384 on 16³ patches, ours of Primus' kind; MONAI's ViTAutoEnc of the same size

    python benchmarks/train_step.py --network all --runs 7 [--peer-python PYTHON] [--device cuda --dtype bf16]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

NETWORKS = ("resenc", "primus", "swin", "vit")
FEATURES, BLOCKS, CLASSES = (32, 64, 128, 256), (1, 2, 2, 2), 3
PAGES = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "8589934592", "MALLOC_TOP_PAD_": "134217728"}
"""Freed blocks stay with the process, as training sets it (see medseg_ssl/train/runtime.py)."""


def our_resenc():
    """Our encoder, decoder and heads; returns logits of every level."""
    from medseg_ssl.nets.decoders.unet import UNet
    from medseg_ssl.nets.encoders.resenc import ResEnc
    from medseg_ssl.nets.segmenter import Segmenter

    encoder = ResEnc(ResEnc.Config(features=FEATURES, blocks=BLOCKS))
    model = Segmenter(encoder, UNet(UNet.Config(), encoder.channels, encoder.strides), CLASSES)
    return model, model.all_logits, "medseg_ssl"


def our_primus(side: int, **options):
    """Our Primus, read by the light decoder straight into classes."""
    import torch

    from medseg_ssl.nets.decoders.light import Light
    from medseg_ssl.nets.encoders.primus import Primus
    from medseg_ssl.nets.tokens import as_map, grid_of

    encoder = Primus(Primus.Config(crop=(side, side, side), **options))
    decoder = Light(Light.Config(width=CLASSES), encoder.channels, encoder.strides)
    model = torch.nn.ModuleList([encoder, decoder])
    encoder.levels.requires_grad_(requires_grad=False)  # its maps are not read

    def logits_of(image):
        tokens = as_map(encoder.tokens(image), grid_of(image.shape[2:], encoder.patch))
        return decoder([image, tokens])

    return model, logits_of, "medseg_ssl"


def our_swin():
    """Our Swin UNETR."""
    from medseg_ssl.nets.decoders.swin_unetr import SwinUNETR
    from medseg_ssl.nets.encoders.swin import Swin
    from medseg_ssl.nets.segmenter import Segmenter

    encoder = Swin(Swin.Config(size="s"))
    decoder = SwinUNETR(SwinUNETR.Config(), encoder.channels, encoder.strides)
    model = Segmenter(encoder, decoder, CLASSES, supervised_levels=1)
    return model, model.all_logits, "medseg_ssl"


def peer_primus(size: int):
    """Primus-S of its authors."""
    from dynamic_network_architectures.architectures.primus import Primus

    shape = {"eva_depth": 12, "eva_numheads": 6, "init_values": 0.1, "scale_attn_inner": True}
    model = Primus(1, 396, (8, 8, 8), CLASSES, input_shape=(size, size, size), **shape)
    model.mask_token.requires_grad_(requires_grad=False)
    return model, lambda image: [model(image)], "dynamic-network-architectures"


def peer_swin():
    """MONAI's Swin UNETR."""
    from monai.networks.nets import SwinUNETR

    model = SwinUNETR(1, CLASSES, feature_size=24)
    return model, lambda image: [model(image)], "monai"


def peer_vit(size: int):
    """MONAI's ViT autoencoder."""
    from monai.networks.nets import ViTAutoEnc

    shape = {"hidden_size": 384, "mlp_dim": 1536, "num_layers": 6, "num_heads": 6}
    model = ViTAutoEnc(1, (size, size, size), (16, 16, 16), CLASSES, **shape)
    return model, lambda image: [model(image)[0]], "monai"


def peer_resenc():
    """nnU-Net's network of the same size, built as its plans do."""
    import torch

    options = {
        "n_stages": len(FEATURES),
        "features_per_stage": FEATURES,
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [[3, 3, 3]] * len(FEATURES),
        "strides": [[1, 1, 1], *([[2, 2, 2]] * (len(FEATURES) - 1))],
        "n_blocks_per_stage": BLOCKS,
        "n_conv_per_stage_decoder": [1] * (len(FEATURES) - 1),
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    try:
        from importlib.metadata import version

        from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
    except ImportError:
        from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet

        options |= {
            "conv_op": torch.nn.Conv3d,
            "norm_op": torch.nn.InstanceNorm3d,
            "nonlin": torch.nn.LeakyReLU,
        }
        model = ResidualEncoderUNet(1, num_classes=CLASSES, deep_supervision=True, **options)
        return model, model, "dynamic-network-architectures"
    name = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
    imports = ["conv_op", "norm_op", "nonlin"]
    model = get_network_from_plans(name, options, imports, 1, CLASSES, deep_supervision=True)
    return model, model, f"nnunetv2 {version('nnunetv2')}"


def build(network: str, side: str, size: int):
    """The model, a function to the logits of its levels, and where it is from."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    ours_vit = {"patch": (16, 16, 16), "embed_dim": 384, "depth": 6, "heads": 6}
    makers = {
        ("resenc", "ours"): our_resenc,
        ("resenc", "peer"): peer_resenc,
        ("primus", "ours"): lambda: our_primus(size, size="s"),
        ("primus", "peer"): lambda: peer_primus(size),
        ("swin", "ours"): our_swin,
        ("swin", "peer"): peer_swin,
        ("vit", "ours"): lambda: our_primus(size, **ours_vit),
        ("vit", "peer"): lambda: peer_vit(size),
    }
    return makers[network, side]()


def make_step(
    network: str, side: str, *, size: int, batch: int, dtype: str, device: str
) -> tuple[Callable[[], None], dict[str, object]]:
    """One optimizer step as a function, and what it runs on."""
    import torch
    import torch.nn.functional as F

    torch.manual_seed(0)
    model, logits_of, source = build(network, side, size)
    model.to(device)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.99, nesterov=True, weight_decay=3e-5)
    image = torch.randn(batch, 1, size, size, size).to(device)
    label = torch.randint(0, CLASSES, (batch, 1, size, size, size)).to(device)

    def loss_of(logits):
        total = torch.zeros((), device=device)
        for level, out in enumerate(logits):
            target = F.interpolate(label.float(), out.shape[2:], mode="nearest")[:, 0].long()
            out = out.float()
            dense = F.one_hot(target, CLASSES).movedim(-1, 1).float()
            probable = out.softmax(1)
            overlap = (
                2 * (probable * dense).sum((2, 3, 4)) / (probable + dense).sum((2, 3, 4)).clamp(min=1e-5)
            )
            total = total + 0.5**level * (F.cross_entropy(out, target) + 1 - overlap[:, 1:].mean())
        return total

    def step() -> None:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == "bf16"):
            logits = logits_of(image)
        optimizer.zero_grad(set_to_none=True)
        loss_of(logits).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 12.0)
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    parameters = sum(p.numel() for p in model.parameters())
    card = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return step, {"source": source, "torch": torch.__version__, "parameters": parameters, "device": card}


def worker(arguments: argparse.Namespace) -> None:
    """Answer every line on stdin with the seconds a step took, by the clock and summed over cores."""
    import torch

    torch.set_num_threads(arguments.threads)
    given = {name: getattr(arguments, name) for name in ("size", "batch", "dtype", "device")}
    step, facts = make_step(arguments.network, arguments.worker, **given)
    for _ in range(arguments.warmup):
        step()
    sys.stdout.write(json.dumps(facts) + "\n")
    sys.stdout.flush()
    for _ in sys.stdin:
        start, cpu = time.perf_counter(), time.process_time()
        step()
        sys.stdout.write(f"{time.perf_counter() - start} {time.process_time() - cpu}\n")
        sys.stdout.flush()


class Side:
    """A worker process and its timings."""

    def __init__(self, name: str, python: str, arguments: argparse.Namespace) -> None:
        passed = [
            f"--{k}={getattr(arguments, k)}"
            for k in ("network", "size", "batch", "threads", "dtype", "device", "warmup")
        ]
        self.process = subprocess.Popen(
            [python, __file__, f"--worker={name}", *passed],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # the side that waits must not spin on the cores of the side that is timed
            env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE", **(PAGES if arguments.pages == "kept" else {})},
        )
        self.facts = json.loads(self._line())
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker ended with code {self.process.wait()}")
        return line

    def step(self) -> None:
        """Let the worker take one step."""
        assert self.process.stdin is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        seconds, cpu_seconds = map(float, self._line().split())
        self.seconds.append(seconds)
        self.cpu_seconds.append(cpu_seconds)

    def close(self) -> None:
        """End the worker."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def measure(arguments: argparse.Namespace) -> dict[str, object]:
    """Interleave the two sides' steps, the order alternating, and sum up."""
    sides = {"ours": Side("ours", sys.executable, arguments)}
    other = arguments.peer_python if arguments.network == "resenc" else None
    sides["peer"] = Side("peer", other or sys.executable, arguments)
    for run in range(arguments.runs):
        for name in sorted(sides, reverse=bool(run % 2)):
            sides[name].step()
    for side in sides.values():
        side.close()
    ratios = [a / b for a, b in zip(sides["ours"].seconds, sides["peer"].seconds, strict=True)]
    median = {name: statistics.median(side.seconds) for name, side in sides.items()}
    return {
        "settings": {
            k: getattr(arguments, k)
            for k in ("network", "size", "batch", "threads", "dtype", "device", "runs", "pages")
        },
        "facts": {name: side.facts for name, side in sides.items()},
        "seconds": {name: side.seconds for name, side in sides.items()},
        "cpu_seconds": {name: side.cpu_seconds for name, side in sides.items()},
        "median_s": median,
        "cpu_ratio": statistics.median(sides["ours"].cpu_seconds)
        / statistics.median(sides["peer"].cpu_seconds),
        "ratio": median["ours"] / median["peer"],
        "ratio_of_pairs": statistics.median(ratios),
    }


def main(argv: list[str] | None = None) -> dict[str, object]:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", choices=(*NETWORKS, "all"), default="resenc")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--pages", choices=("kept", "default"), default="kept", help="freed memory, both sides"
    )
    parser.add_argument("--peer-python", default=os.environ.get("MEDSEG_PEER_PYTHON"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", choices=("ours", "peer"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.worker:
        worker(arguments)
        return {}
    results = {}
    for network in NETWORKS if arguments.network == "all" else (arguments.network,):
        results[network] = measure(argparse.Namespace(**{**vars(arguments), "network": network}))
        _show(results[network])
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=1), encoding="utf-8")
    return results


def _show(result: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    s = result["settings"]
    what = f"{s['network']}, {s['size']}³, batch {s['batch']}, {s['dtype']}"
    title = f"training step of {what}, {s['threads']} threads, {s['runs']} runs, {result['facts']['ours']['device']}"
    table = Table("side", "network from", "torch", "parameters", "median s", "fastest s", title=title)
    for name, facts in result["facts"].items():
        seconds = result["seconds"][name]
        table.add_row(
            name, facts["source"], facts["torch"], f"{facts['parameters']:,}",
            f"{statistics.median(seconds):.3f}", f"{min(seconds):.3f}",
        )  # fmt: skip
    console = Console()
    console.print(table)
    console.print(
        f"ratio ours / peer: {result['ratio']:.3f} (median of pairs {result['ratio_of_pairs']:.3f})"
    )
    console.print(f"ratio of CPU seconds, which a busy machine disturbs less: {result['cpu_ratio']:.3f}")


if __name__ == "__main__":
    main()
