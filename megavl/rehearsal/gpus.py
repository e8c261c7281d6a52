"""Operators that a GPU without the optional libraries gets, and their kernels, on a machine that has no GPU."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from unittest import mock

import torch
from torch import Tensor

from megavl.ops.dispatch import Ops, choose

_LIBRARIES = ("flash_attn", "fused_layer_norm_cuda", "grouped_gemm")


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU. capability: compute capability; multiprocessors: number of them (CUDA programming guide)"""

    name: str
    capability: tuple[int, int]
    multiprocessors: int


GPUS = {"ampere": Gpu("A100", (8, 0), 108), "hopper": Gpu("H100", (9, 0), 132)}


def gpu_ops(gpu: Gpu, triton: bool, wanted: Iterable[tuple[str, str]] = ()) -> Ops:
    """The first candidate of each operator, with or without Triton, or the one that is wanted by (operator, candidate).
    They run on fake tensors; a CPU has no kernel for some of them."""
    with (
        _without(*_LIBRARIES, *(() if triton else ("triton",))),
        mock.patch.object(torch.cuda, "get_device_capability", lambda device: gpu.capability),
        mock.patch.object(torch.cuda, "get_device_name", lambda device: gpu.name),
    ):
        return choose(torch.device("cuda"), wanted)


@contextmanager
def gpu_kernels(gpu: Gpu, note: Callable[[Sequence[Tensor]], None]) -> Iterator[None]:
    """While entered, Triton kernels are launched as on a GPU, and compute nothing.

    Args:
        note: called with the tensors of each launch, each once
    """
    if find_spec("triton") is None:
        yield
        return
    # Imported here: these modules need Triton.
    from megavl.ops.kernels import norm
    from megavl.rehearsal.triton_launches import noted_launches

    with noted_launches(note), mock.patch.object(norm, "multiprocessors", lambda device: gpu.multiprocessors):
        yield


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
