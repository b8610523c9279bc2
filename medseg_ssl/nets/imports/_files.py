"""Reading a foreign file of weights: torch's own restricted reader, and one line for everything that can be wrong."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medseg_ssl.config import UserError

_BEGINNINGS = {
    b"<!doctype": "a web page (HTML): the download asked for a confirmation or failed",
    b"<html": "a web page (HTML): the download asked for a confirmation or failed",
    b"version https://git-lfs": "a Git LFS pointer: fetch the file itself (git lfs pull)",
    b"{": "JSON text",
}


def read(path: Path) -> Any:
    """What a ``.pth``/``.pt`` (zip or older) or ``.safetensors`` file holds, on the CPU.

    Nothing that a file holds is ever called but torch's builders of tensors and numpy's of numbers and arrays, which
    checkpoints of nnU-Net and its kin hold beside their weights.

    Raises:
        UserError: missing, empty, truncated or another kind of file, or one that holds something else than tensors,
            numbers, text and containers; the message names it.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no file at {path}")
    with path.open("rb") as file:
        head = file.read(64).lstrip().lower()
    if not head:
        raise UserError(f"{path} is empty")
    # the length that a safetensors file begins with may happen to read as text
    others = {} if path.suffix == ".safetensors" else _BEGINNINGS
    for beginning, meaning in others.items():
        if head.startswith(beginning):
            raise UserError(f"{path} is no file of weights but {meaning}")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        with torch.serialization.safe_globals(_harmless()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle's protocol; what cannot be read is told below
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken pickle may raise anything at all; it says which
        raise UserError(_why(path, head, error)) from error


def _read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is no readable safetensors file: {' '.join(str(error).split())}") from error


def _harmless() -> list[Any]:
    """Numpy's builders of numbers and arrays, by the names of numpy 1 and of numpy 2."""
    core = np._core.multiarray  # pyright: ignore[reportAttributeAccessIssue]
    kinds = [type(np.dtype(code)) for code in ("?", *"bhilqBHILQefdgU")]
    names = [
        (getattr(core, builder), f"numpy.{place}.multiarray.{builder}")
        for builder in ("scalar", "_reconstruct")
        for place in ("core", "_core")
    ]
    return [*dict.fromkeys(kinds), *names, np.dtype, np.ndarray]


def _why(path: Path, head: bytes, error: Exception) -> str:
    text = " ".join(str(error).split())
    found = re.search(r"GLOBAL (\S+) was not an allowed global|unsupported GLOBAL (\S+) whose module", text)
    if found:
        return (
            f"{path} was not read: it holds {found[1] or found[2]!r}, which is no tensor, number or text and could run "
            "code; nothing was run. Ask its authors for the weights alone (a state dict, better as safetensors)"
        )
    called = re.search(r"Trying to call reduce for unrecognized function (.{1,80})", text)
    if called:
        return f"{path} was not read: it wants to call {called[1]}; nothing was run"
    if "Unsupported operand" in text and head.startswith(b"\x80"):
        return f"{path} was not read: it is a pickle of more than tensors, which is never opened; nothing was run"
    reason = re.split(r" (?:Check the documentation|Please file an issue|Make sure)", text)[0]
    reason = re.sub(r"^Weights only load failed\.(?:.*?(?=Unsupported|Invalid))?", "", reason).strip()[:160]
    return f"{path} is no readable file of weights (truncated, or another format): {type(error).__name__}: {reason}"
