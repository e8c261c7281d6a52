"""Products of bf16 tensors, summed in fp32 and rounded to bf16 once, on every device.

On a CPU without bf16 units torch multiplies bf16 matrices by a plain loop: on an AVX2 CPU at 2 to 5 GFLOP/s, where fp32
reaches 60. There the product, and with it its backward pass, is done in fp32. On a GPU torch allows cuBLAS
to split a long sum and to add the parts in bf16, which rounds a gradient several times; this is disabled.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_PRODUCTS = {
    F.linear,
    F.conv2d,
    F.scaled_dot_product_attention,
    torch.einsum,
    torch.matmul,
    Tensor.matmul,
    Tensor.__matmul__,
}


class Float32Products(TorchFunctionMode):
    """While entered, products of bf16 tensors are computed in fp32 and returned in bf16."""

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function not in _PRODUCTS or not any(_is_bf16(argument) for argument in args):
            return function(*args, **kwargs)
        args = [argument.float() if _is_bf16(argument) else argument for argument in args]
        kwargs = {name: value.float() if _is_bf16(value) else value for name, value in kwargs.items()}
        return function(*args, **kwargs).to(torch.bfloat16)


class Float32Sums(AbstractContextManager):
    """While entered, cuBLAS adds the parts of a bf16 sum in fp32. Reentrant: a recomputed block enters it again."""

    def __init__(self):
        self._before: list[bool] = []

    def __enter__(self) -> None:
        self._before.append(torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction)
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False

    def __exit__(self, *_: object) -> None:
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = self._before.pop()


def _is_bf16(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.bfloat16


def products(device: torch.device) -> tuple[AbstractContextManager, str]:
    """The context in which a model runs on `device`, and why."""
    if device.type == "cuda":
        return Float32Sums(), "torch, sums of bf16 products in fp32"
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return nullcontext(), "torch"
    return (
        Float32Products(),
        "bf16 through fp32 (this CPU has no bf16 unit, torch's own bf16 products are ten times slower)",
    )
