"""Operations that make a GPU's host wait, found without a GPU: tensors on the device ``meta`` stand in for one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_CHECKED = ("linalg_solve", "linalg_inv", "linalg_inv_ex", "linalg_eigh", "linalg_cholesky", "linalg_svd")


class NoWaiting(TorchDispatchMode):
    """Collects blocking copies to the device and calls whose errors are read back; values read raise by themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in ("_to_copy", "copy_"):
            source = args[1] if name == "copy_" else args[0]
            target = args[0].device if name == "copy_" else kwargs.get("device") or source.device
            crosses = torch.device(target).type == "meta" and source.device.type != "meta"
            waits_not = kwargs.get("non_blocking", name == "copy_" and len(args) > 2 and args[2])
            if crosses and not waits_not:
                self.found.append(f"{name} of {tuple(source.shape)}")
        elif name in _CHECKED and any(isinstance(a, Tensor) and a.is_meta for a in args):
            self.found.append(name)
        return func(*args, **kwargs)
