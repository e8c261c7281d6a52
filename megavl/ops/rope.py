"""Rotary positions (arXiv 2104.09864), in the two orders of channels that the decoders have.

Llama turns channel i with channel i + d / 2, latent attention channel 2i with channel 2i + 1.
"""

import torch
from torch import Tensor


def rotation(positions: Tensor, width: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of every position's angles, both float32 [T, 1, width / 2], for `rotate_halves` and `rotate_pairs`.

    positions: int64 [T]; pair i turns by position / theta^(2i / width) radians. fp32 whatever the model's dtype:
    bfloat16 cannot tell the angles of neighbouring positions apart.
    """
    channels = torch.arange(0, width, 2, dtype=torch.float32, device=positions.device)
    frequencies = 1.0 / theta ** (channels / width)  # [width / 2]
    angles = (positions[:, None].float() * frequencies).unsqueeze(1)  # [T, 1, width / 2]
    return angles.cos(), angles.sin()


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn queries or keys x [T, H, d], channel i with channel i + d / 2; computed in fp32, returned in x's dtype."""
    first, second = x.float().chunk(2, dim=-1)  # [T, H, d / 2] each
    return torch.cat(_turn(first, second, cos, sin), dim=-1).to(x.dtype)  # [T, H, d]


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn queries or keys x [T, H, d], channel 2i with channel 2i + 1; computed in fp32, returned in x's dtype."""
    first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # [T, H, d / 2] each
    return torch.stack(_turn(first, second, cos, sin), dim=-1).flatten(-2).to(x.dtype)  # [T, H, d]


def _turn(first: Tensor, second: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return first * cos - second * sin, second * cos + first * sin
