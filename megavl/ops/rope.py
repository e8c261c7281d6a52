"""Rotary positions (arXiv 2104.09864), the rotate-half form of Llama: channel i turns with channel i + d / 2."""

import torch
from torch import Tensor


def rotation(positions: Tensor, head_width: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of every position's angles, both float32 [T, 1, d], for `rotate`.

    positions: int64 [T]; pair i turns by position / theta^(2i / d) radians. fp32 whatever the model's dtype: bfloat16
    cannot tell the angles of neighbouring positions apart.
    """
    channels = torch.arange(0, head_width, 2, dtype=torch.float32, device=positions.device)
    frequencies = 1.0 / theta ** (channels / head_width)  # [d / 2]
    angles = positions[:, None].float() * frequencies  # [T, d / 2]
    angles = torch.cat((angles, angles), dim=-1).unsqueeze(1)  # [T, 1, d]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn queries or keys x [T, H, d] by the angles of `rotation`; computed in fp32, returned in x's dtype."""
    first, second = x.float().chunk(2, dim=-1)  # [T, H, d / 2] each
    turned = torch.cat((-second, first), dim=-1)  # [T, H, d]
    return (x.float() * cos + turned * sin).to(x.dtype)
