"""Rotary positions of latent attention in Triton: one launch assembles queries and keys, one their gradients.

Each program handles one token. Values are a view of `kv`, whose gradient the backward pass writes once, for keys and
values together. Only the tables are kept for the backward pass.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megavl.ops.kernels.layout import with_unit_stride
from megavl.ops.kernels.tiles import heads_per_tile, warps


@triton.jit
def _copy_heads(x, out, head_stride, out_stride, heads, width, HEADS: tl.constexpr, WIDTH: tl.constexpr):
    """out = x, both [heads, width], with heads `head_stride` and `out_stride` apart."""
    channel = tl.arange(0, WIDTH)
    for start in range(0, heads, HEADS):
        head = start + tl.arange(0, HEADS)
        inside = (head < heads)[:, None] & (channel < width)[None, :]
        value = tl.load(x + head[:, None] * head_stride + channel[None, :], mask=inside)
        tl.store(out + head[:, None] * out_stride + channel[None, :], value, mask=inside)


@triton.jit
def _turned(value, cos, sin, HEADS: tl.constexpr, HALF: tl.constexpr):
    """Rotate pairs of neighbouring channels: float32 [HEADS, 2 * HALF]."""
    # Both channels of a pair come with one load: two loads with a stride of 2 would halve its width.
    first, second = tl.split(tl.reshape(value, [HEADS, HALF, 2]))
    return tl.reshape(tl.join(first * cos - second * sin, second * cos + first * sin), [HEADS, 2 * HALF])


@triton.jit
def _rotate_pairs(x, out, cos, sin, head_stride, out_stride, heads, half, HEADS: tl.constexpr, HALF: tl.constexpr):
    """Rotate the heads of one token: x and out [heads, 2 * half], heads `head_stride` and `out_stride` apart."""
    channel = tl.arange(0, 2 * HALF)
    for start in range(0, heads, HEADS):
        head = start + tl.arange(0, HEADS)
        inside = (head < heads)[:, None] & (channel < 2 * half)[None, :]
        value = tl.load(x + head[:, None] * head_stride + channel[None, :], mask=inside, other=0.0).to(tl.float32)
        turned = _turned(value, cos, sin, HEADS, HALF).to(out.dtype.element_ty)
        tl.store(out + head[:, None] * out_stride + channel[None, :], turned, mask=inside)


@triton.jit
def _angles(cos, sin, token, half, HALF: tl.constexpr):
    channel = tl.arange(0, HALF)
    inside = channel < half
    token_cos = tl.load(cos + token * half + channel, mask=inside, other=0.0)[None, :]
    return token_cos, tl.load(sin + token * half + channel, mask=inside, other=0.0)[None, :]


@triton.jit
def forward_kernel(
    q,  # [T, heads, nope + 2 * half], with strides
    kv,  # [T, heads, nope + value], with strides
    k_rope,  # [T, 2 * half], rows `k_rope_stride` apart
    q_out,  # [T, heads, nope + 2 * half], contiguous
    k_out,  # like q_out
    cos,  # float32 [T, half]
    sin,  # float32 [T, half]
    q_stride,
    q_head_stride,
    kv_stride,
    kv_head_stride,
    k_rope_stride,
    heads,
    nope,
    half,
    HEADS: tl.constexpr,
    NOPE: tl.constexpr,
    HALF: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    width = nope + 2 * half
    q += token * q_stride
    q_out += token * heads * width
    k_out += token * heads * width
    token_cos, token_sin = _angles(cos, sin, token, half, HALF)
    _copy_heads(q, q_out, q_head_stride, width, heads, nope, HEADS, NOPE)
    _rotate_pairs(q + nope, q_out + nope, token_cos, token_sin, q_head_stride, width, heads, half, HEADS, HALF)
    _copy_heads(kv + token * kv_stride, k_out, kv_head_stride, width, heads, nope, HEADS, NOPE)
    # A stride of 0: every head gets the same channels.
    k_rope += token * k_rope_stride
    _rotate_pairs(k_rope, k_out + nope, token_cos, token_sin, 0, width, heads, half, HEADS, HALF)


@triton.jit
def backward_kernel(
    q_grad,  # [T, heads, nope + 2 * half], with strides
    k_grad,  # [T, heads, nope + 2 * half], with strides
    v_grad,  # [T, heads, value], with strides
    for_q,  # [T, heads, nope + 2 * half], contiguous
    for_kv,  # [T, heads, nope + value], contiguous
    for_k_rope,  # [T, 2 * half], contiguous
    cos,  # float32 [T, half]
    sin,  # float32 [T, half]
    q_stride,
    q_head_stride,
    k_stride,
    k_head_stride,
    v_stride,
    v_head_stride,
    heads,
    nope,
    half,
    value_width,
    HEADS: tl.constexpr,
    NOPE: tl.constexpr,
    HALF: tl.constexpr,
    VALUE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    width, kv_width = nope + 2 * half, nope + value_width
    q_grad += token * q_stride
    k_grad += token * k_stride
    for_q += token * heads * width
    for_kv += token * heads * kv_width
    token_cos, token_sin = _angles(cos, sin, token, half, HALF)
    token_sin = -token_sin
    _copy_heads(q_grad, for_q, q_head_stride, width, heads, nope, HEADS, NOPE)
    _rotate_pairs(q_grad + nope, for_q + nope, token_cos, token_sin, q_head_stride, width, heads, half, HEADS, HALF)
    _copy_heads(k_grad, for_kv, k_head_stride, kv_width, heads, nope, HEADS, NOPE)
    _copy_heads(v_grad + token * v_stride, for_kv + nope, v_head_stride, kv_width, heads, value_width, HEADS, VALUE)
    channel = tl.arange(0, 2 * HALF)
    total = tl.zeros([1, 2 * HALF], tl.float32)
    for start in range(0, heads, HEADS):
        head = start + tl.arange(0, HEADS)
        inside = (head < heads)[:, None] & (channel < 2 * half)[None, :]
        part = tl.load(k_grad + nope + head[:, None] * k_head_stride + channel[None, :], mask=inside, other=0.0)
        total += tl.sum(part.to(tl.float32), 0)[None, :]
    turned = _turned(total, token_cos, token_sin, 1, HALF).to(for_k_rope.dtype.element_ty)
    tl.store(for_k_rope + token * (2 * half) + channel[None, :], turned, mask=(channel < 2 * half)[None, :])


def _forward(q: Tensor, kv: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys, [T, H, nope + rope] each."""
    tokens, heads, width = q.shape
    half = k_rope.shape[2] // 2
    nope = width - 2 * half
    q, kv, k_rope = with_unit_stride(q), with_unit_stride(kv), with_unit_stride(k_rope)
    q_out, k_out = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(2))
    if tokens:
        tile = heads_per_tile(heads, max(nope, 2 * half))
        forward_kernel[(tokens,)](
            *(q, kv[..., :nope], k_rope, q_out, k_out, cos, sin),
            *(q.stride(0), q.stride(1), kv.stride(0), kv.stride(1), k_rope.stride(0), heads, nope, half),
            HEADS=tile,
            NOPE=triton.next_power_of_2(nope),
            HALF=triton.next_power_of_2(half),
            num_warps=warps(tile, nope),
        )
    return q_out, k_out


def _backward(
    q_grad: Tensor, k_grad: Tensor, v_grad: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, kv and k_rope."""
    tokens, heads, width = q_grad.shape
    half, value = cos.shape[-1], v_grad.shape[2]
    nope = width - 2 * half
    q_grad, k_grad, v_grad = with_unit_stride(q_grad), with_unit_stride(k_grad), with_unit_stride(v_grad)
    for_q = torch.empty(q_grad.shape, dtype=q_grad.dtype, device=q_grad.device)  # [T, H, nope + rope]
    for_kv = k_grad.new_empty(tokens, heads, nope + value)
    for_k_rope = k_grad.new_empty(tokens, 1, 2 * half)
    if tokens:
        tile = heads_per_tile(heads, max(nope, 2 * half, value))
        backward_kernel[(tokens,)](
            *(q_grad, k_grad, v_grad, for_q, for_kv, for_k_rope, cos, sin),
            *(q_grad.stride(0), q_grad.stride(1), k_grad.stride(0), k_grad.stride(1)),
            *(v_grad.stride(0), v_grad.stride(1), heads, nope, half, value),
            HEADS=tile,
            NOPE=triton.next_power_of_2(nope),
            HALF=triton.next_power_of_2(half),
            VALUE=triton.next_power_of_2(value),
            num_warps=warps(tile, nope),
        )
    return for_q, for_kv, for_k_rope


class _RotateLatent(Function):
    @staticmethod
    def forward(ctx, q: Tensor, kv: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        cos, sin = cos.contiguous(), sin.contiguous()  # [T, 1, rope / 2] each; both are already
        ctx.save_for_backward(cos, sin)
        nope = q.shape[2] - k_rope.shape[2]
        return *_forward(q, kv, k_rope, cos, sin), kv[..., nope:]

    @staticmethod
    @once_differentiable
    def backward(ctx, q_grad: Tensor, k_grad: Tensor, v_grad: Tensor):
        # Not in place: nothing says that these gradients have no other reader.
        return *_backward(q_grad, k_grad, v_grad, *ctx.saved_tensors), None, None


def fused_rotate_latent(
    q: Tensor, kv: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """A `RotateLatent` of megavl.ops.rope; the values are a view of `kv`."""
    return _RotateLatent.apply(q, kv, k_rope, cos, sin)
