"""RMSNorm (arXiv 1910.07467), rounded as Llama does: statistics in fp32, weight applied in the input's dtype."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight. x: [T, D]; weight: [D]; returns [T, D] in x's dtype.

    The weight is an argument, not a module's own, so that parallel code may wrap it on the way.
    """
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)  # [T, 1]
    return weight * (wide * scale).to(x.dtype)
