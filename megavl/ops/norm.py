"""RMSNorm (arXiv 1910.07467), rounded as Llama does: statistics in fp32, weight applied in the input's dtype."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import Function


class _RmsNorm(Function):
    """Keeps x itself and the scale of each row; autograd would keep two more tensors of the size of x."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])  # [T, 1]
        scale = mean_square.add_(eps).rsqrt_()  # [T, 1]
        ctx.save_for_backward(x, weight, scale)
        return weight * (wide * scale).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, scale = ctx.saved_tensors
        grad, wide_weight = grad.float(), weight.float()
        normed = x.float() * scale  # [T, D]
        product = grad * normed  # [T, D]
        for_weight = product.sum(0)  # [D]
        mean = product.mul_(wide_weight).sum(-1, keepdim=True).div_(x.shape[-1])  # [T, 1]
        for_x = torch.mul(grad, wide_weight, out=product).addcmul_(normed, mean, value=-1.0).mul_(scale)  # [T, D]
        return for_x.to(x.dtype), for_weight.to(weight.dtype), None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight. x: [T, D]; weight: [D]; returns [T, D] in x's dtype.

    The weight is an argument, not a module's own, so that parallel code may wrap it on the way.
    """
    return _RmsNorm.apply(x, weight, eps)


def add_rms_norm(h: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The residual stream h + delta, and `rms_norm` of it. h, delta: [T, D]; weight: [D]; returns two [T, D]."""
    h = h + delta
    return h, rms_norm(h, weight, eps)


@dataclass(frozen=True)
class Norms:
    """One implementation of both operations, each with its derivative."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]


REFERENCE_NORMS = Norms(rms_norm, add_rms_norm)
