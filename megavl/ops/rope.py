"""Rotary positions (arXiv 2104.09864), in the two orders of channels that the decoders have.

Llama rotates channel i with channel i + d / 2 of all channels (`RotateHalves`):
    q: [T, H, d]; k: [T, H_k, d]
    cos, sin: float32 [T, 1, d / 2], of `rotary_tables`
    returns q and k, rotated in fp32, in their own shapes and dtypes

Latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1.3) rotates channel 2i with channel 2i + 1 of the last
`rope` channels of a head. All heads share those of a key (`RotateLatent`):
    q:      [T, H, nope + rope]
    kv:     [T, H, nope + value], of each head its key's channels without a position, then its value
    k_rope: [T, 1, rope]
    cos, sin: float32 [T, 1, rope / 2], of `rotary_tables`
    returns queries and keys [T, H, nope + rope], rotated in fp32, and values [T, H, value]; all in the dtype of the
    operands
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import Function

RotateHalves = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
RotateLatent = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Rotary:
    """One implementation of both, each with its derivative."""

    halves: RotateHalves
    latent: RotateLatent


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
    """See `RotateHalves`."""
    return tuple(_Rotation.apply(x, cos, sin, _halves) for x in (q, k))


def rotate_latent(q: Tensor, kv: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See `RotateLatent`."""
    (heads, key_width), rope = q.shape[1:], k_rope.shape[2]
    nope = key_width - rope
    q_nope, q_rope = q.split((nope, rope), dim=2)  # [T, H, nope], [T, H, rope]
    k_nope, v = kv.split((nope, kv.shape[2] - nope), dim=2)  # [T, H, nope], [T, H, value]
    q_rope, k_rope = (_Rotation.apply(x, cos, sin, _pairs) for x in (q_rope, k_rope))  # [T, H, rope], [T, 1, rope]
    q = torch.cat((q_nope, q_rope), dim=2)  # [T, H, nope + rope]
    return q, torch.cat((k_nope, k_rope.expand(-1, heads, -1)), dim=2), v


def _halves(x: Tensor) -> Sequence[Tensor]:
    """Views [T, H, d / 2] of the channels that are rotated with each other."""
    return x.chunk(2, dim=-1)


def _pairs(x: Tensor) -> Sequence[Tensor]:
    """As `_halves`."""
    return x.unflatten(-1, (-1, 2)).unbind(-1)


class _Rotation(Function):
    """The gradient is the gradient of the result, rotated back; only the tables are kept."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor, channels: Callable[[Tensor], Sequence[Tensor]]) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.channels = channels
        return _rotated(x, cos, sin, channels)

    @staticmethod
    def backward(ctx, grad: Tensor):
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, -sin, ctx.channels), None, None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, channels: Callable[[Tensor], Sequence[Tensor]]) -> Tensor:
    """[T, H, d] in the dtype of x."""
    wide = x.float()
    both = cos.new_empty(len(cos), 1, x.shape[2])  # [T, 1, d], the cosine of each channel
    for place in channels(both):
        place.copy_(cos)
    out = wide * both
    first, second = channels(wide)  # [T, H, d / 2] each
    for place, other, sign in zip(channels(out), (second, first), (-1.0, 1.0), strict=True):
        place.addcmul_(other, sin, value=sign)
    return out.to(x.dtype)


REFERENCE_ROTARY = Rotary(rotate_halves, rotate_latent)
