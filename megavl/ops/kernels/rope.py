"""Rotary positions in Triton: queries and keys in one launch, forward and backward.

The backward pass is the rotation by the negative angle, so nothing but the tables is kept.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megavl.ops.kernels.latent import fused_rotate_latent
from megavl.ops.kernels.layout import with_unit_stride
from megavl.ops.kernels.tiles import heads_per_tile, warps
from megavl.ops.rope import Rotary


@triton.jit
def _rotate_heads(x, out, cos, sin, head_stride, heads, half, HEADS: tl.constexpr, HALF: tl.constexpr):
    """Rotate the heads of one token: x [heads, 2 * half], heads `head_stride` apart, to `out`, contiguous."""
    channel = tl.arange(0, HALF)
    for start in range(0, heads, HEADS):
        head = start + tl.arange(0, HEADS)
        inside = (head < heads)[:, None] & (channel < half)[None, :]
        source = x + head[:, None] * head_stride + channel[None, :]
        target = out + head[:, None] * (2 * half) + channel[None, :]
        first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
        tl.store(target, (first * cos - second * sin).to(out.dtype.element_ty), mask=inside)
        tl.store(target + half, (second * cos + first * sin).to(out.dtype.element_ty), mask=inside)


@triton.jit
def rotate_kernel(
    q,  # [T, heads, 2 * half], with strides
    k,  # [T, k_heads, 2 * half], with strides
    q_out,  # contiguous
    k_out,  # contiguous
    cos,  # float32 [T, half]
    sin,  # float32 [T, half]
    q_stride,
    q_head_stride,
    k_stride,
    k_head_stride,
    heads,
    k_heads,
    half,
    BACK: tl.constexpr,
    HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, HALF)
    inside = channel < half
    token_cos = tl.load(cos + token * half + channel, mask=inside, other=0.0)[None, :]
    token_sin = tl.load(sin + token * half + channel, mask=inside, other=0.0)[None, :]
    if BACK:
        token_sin = -token_sin
    _rotate_heads(
        q + token * q_stride,
        q_out + token * heads * (2 * half),
        token_cos,
        token_sin,
        q_head_stride,
        heads,
        half,
        HEADS,
        HALF,
    )
    _rotate_heads(
        k + token * k_stride,
        k_out + token * k_heads * (2 * half),
        token_cos,
        token_sin,
        k_head_stride,
        k_heads,
        half,
        K_HEADS,
        HALF,
    )


def _rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    tokens, heads, width = q.shape
    k_heads, half = k.shape[1], width // 2
    q, k = with_unit_stride(q), with_unit_stride(k)
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)  # [T, H, d]
    k_out = torch.empty(k.shape, dtype=k.dtype, device=k.device)  # [T, H_k, d]
    if tokens:
        tile = heads_per_tile(heads, half)
        rotate_kernel[(tokens,)](
            *(q, k, q_out, k_out, cos, sin, q.stride(0), q.stride(1), k.stride(0), k.stride(1), heads, k_heads, half),
            BACK=back,
            HEADS=tile,
            K_HEADS=heads_per_tile(k_heads, half),
            HALF=triton.next_power_of_2(half),
            num_warps=warps(tile, half),
        )
    return q_out, k_out


class _Rotate(Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = cos.contiguous(), sin.contiguous()  # [T, 1, d / 2] each; both are already
        ctx.save_for_backward(cos, sin)
        return _rotate(q, k, cos, sin, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx, q_grad: Tensor, k_grad: Tensor):
        # Not in place: nothing says that these gradients have no other reader.
        return *_rotate(q_grad, k_grad, *ctx.saved_tensors, back=True), None, None


def fused_rotate_halves(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """A `RotateHalves` of megavl.ops.rope."""
    return _Rotate.apply(q, k, cos, sin)


TRITON_ROTARY = Rotary(fused_rotate_halves, fused_rotate_latent)
