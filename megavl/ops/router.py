"""Products of tokens with the weight of a router, with the precision of fp32.

Every implementation has one signature, `RouterLogits`:
    h:      [T, D]
    weight: [E, D], in the dtype of h
    returns float32 [T, E]; products, sums and the incoming gradient are in fp32, and the gradients of h and weight are
    rounded once, to their dtypes
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

RouterLogits = Callable[[Tensor, Tensor], Tensor]
# Product of two bf16 matrices in float32.
WideProduct = Callable[[Tensor, Tensor], Tensor]


def reference_router_logits(h: Tensor, weight: Tensor) -> Tensor:
    """From fp32 copies of both operands: any device and dtype."""
    return F.linear(h.float(), weight.float())


def wide_mm(left: Tensor, right: Tensor) -> Tensor:
    """A `WideProduct`, which torch has for CUDA."""
    return torch.mm(left, right, out_dtype=torch.float32)


class _WideLogits(Function):
    """Products without fp32 copies of the operands: a product of two bf16 numbers is exact in fp32. The fp32 gradient
    is, up to a relative error of 2^-17, the sum of two bf16 matrices, which are multiplied side by side."""

    @staticmethod
    def forward(ctx, h: Tensor, weight: Tensor, product: WideProduct) -> Tensor:
        ctx.save_for_backward(h, weight)
        ctx.product = product
        return product(h, weight.t())  # [T, E]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        h, weight = ctx.saved_tensors
        parts = grad.new_empty(len(grad), 2, grad.shape[1], dtype=h.dtype)  # [T, 2, E]
        parts[:, 0] = grad
        parts[:, 1] = grad - parts[:, 0]
        parts = parts.flatten(1)  # [T, 2 * E]
        for_h = parts @ weight.repeat(2, 1)  # [T, D]
        for_weight = ctx.product(parts.t(), h).unflatten(0, (2, -1)).sum(0)  # [E, D]
        return for_h, for_weight.to(weight.dtype), None


def wide_router_logits(product: WideProduct) -> RouterLogits:
    """`product` for bf16, the reference for other dtypes."""

    def router_logits(h: Tensor, weight: Tensor) -> Tensor:
        if h.dtype != torch.bfloat16:
            return reference_router_logits(h, weight)
        return _WideLogits.apply(h, weight, product)

    return router_logits
