"""Rotary positions (arXiv 2104.09864), in the two orders of channels that the decoders have.

Llama rotates channel i with channel i + d / 2, latent attention channel 2i with channel 2i + 1. Every implementation of
either has one signature, `Rotate`:
    q: [T, H, d]; k: [T, H_k, d]
    cos, sin: float32 [T, 1, d / 2], of `rotary_tables`
    returns q and k, rotated in fp32, in their own shapes and dtypes
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Rotate = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Rotary:
    """One implementation of both orders of channels, each with its derivative."""

    halves: Rotate
    pairs: Rotate


def rotary_tables(positions: Tensor, width: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of every position's angles, both float32 [T, 1, width / 2].

    fp32 whatever the model's dtype: bfloat16 cannot tell the angles of neighbouring positions apart.

    Args:
        positions: int64 [T]
        width: channels of a head that are rotated
        theta: pair i rotates by position / theta^(2i / width) radians
    """
    channels = torch.arange(0, width, 2, dtype=torch.float32, device=positions.device)
    frequencies = 1.0 / theta ** (channels / width)  # [width / 2]
    angles = (positions[:, None].float() * frequencies).unsqueeze(1)  # [T, 1, width / 2]
    return angles.cos(), angles.sin()


def rotate_halves(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Channel i with channel i + d / 2; see `Rotate`."""
    return _halves(q, cos, sin), _halves(k, cos, sin)


def rotate_pairs(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Channel 2i with channel 2i + 1; see `Rotate`."""
    return _pairs(q, cos, sin), _pairs(k, cos, sin)


def _halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)  # [T, H, d / 2] each
    return torch.cat(_rotate(first, second, cos, sin), dim=-1).to(x.dtype)  # [T, H, d]


def _pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # [T, H, d / 2] each
    return torch.stack(_rotate(first, second, cos, sin), dim=-1).flatten(-2).to(x.dtype)  # [T, H, d]


def _rotate(first: Tensor, second: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return first * cos - second * sin, second * cos + first * sin


REFERENCE_ROTARY = Rotary(rotate_halves, rotate_pairs)
