"""Operators that a Hopper GPU gets with torch and none of the optional libraries, on a machine without one."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch

from megavl.ops.dispatch import Ops, choose

_LIBRARIES = ("flash_attn", "fused_layer_norm_cuda", "grouped_gemm", "triton")


def hopper_ops() -> Ops:
    """The operators. They run on fake tensors; a CPU has no kernel for some of them."""
    with (
        _without(*_LIBRARIES),
        mock.patch.object(torch.cuda, "get_device_capability", lambda device: (9, 0)),
        mock.patch.object(torch.cuda, "get_device_name", lambda device: "Hopper"),
    ):
        return choose(torch.device("cuda"))


@contextmanager
def _without(*modules: str) -> Iterator[None]:
    """While entered, these modules do not import. Others that are imported meanwhile stay imported, which
    `mock.patch.dict(sys.modules)` would undo."""
    before = {name: sys.modules[name] for name in modules if name in sys.modules}
    sys.modules.update(dict.fromkeys(modules))
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]
        sys.modules.update(before)
