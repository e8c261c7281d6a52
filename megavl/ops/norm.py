"""RMSNorm (arXiv 1910.07467), rounded as Llama does: statistics in fp32, weight applied in the input's dtype."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight. x: [T, D]; weight: [D]; returns [T, D] in x's dtype.

    The weight is an argument, not a module's own, so that parallel code may wrap it on the way.
    """
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)  # [T, 1]
    return weight * (wide * scale).to(x.dtype)


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
