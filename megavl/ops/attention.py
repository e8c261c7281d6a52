"""Causal attention over packed documents: no padding, and no document sees another.

Every implementation has one signature, `PackedAttention`:
    q: [T, H, d]; k: [T, H_kv, d]; v: [T, H_kv, d_v], with H_kv a divisor of H (grouped queries, arXiv 2305.13245)
       and d_v at most d
    cu_seqlens: int32 [N + 1]; document n is rows cu_seqlens[n]:cu_seqlens[n + 1]; the last entry is T
    lengths: rows of each document, on the host
    returns [T, H, d_v], scores scaled by 1 / sqrt(d)
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from megavl.ops.alignment import aligned, with_aligned_gradient
from megavl.ops.small_products import attend

PackedAttention = Callable[[Tensor, Tensor, Tensor, Tensor, Sequence[int]], Tensor]
# q, k, v, cu_seqlens, length of the longest document.
VarlenKernel = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]

# What both FlashAttention builds serve.
_HALF = (torch.float16, torch.bfloat16)
_HEAD_WIDTH_MULTIPLE, _MAX_HEAD_WIDTH = 8, 256


def reference_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, lengths: Sequence[int]) -> Tensor:
    """One causal `scaled_dot_product_attention` per document: exact, any device and dtype.

    torch's fused kernel for CPUs serves values as wide as the keys; narrower ones are filled up with zeros. Of 192 and
    128 channels, forward and backward then take a sixth (bf16) to a half (fp32) of the time at 4096 tokens, and up to
    1.4 times the time in fp32 at 64 to 256.
    """
    grouped, value_width = q.shape[1] != k.shape[1], v.shape[2]
    v = F.pad(v, (0, q.shape[2] - value_width)) if value_width < q.shape[2] else v  # [T, H_kv, d]
    # The values may be a slice of a wider tensor, and a document is a slice of the rows: either can be misaligned, and
    # so can the gradients.
    documents = zip(*(x.split(list(lengths)) for x in (q, k, v)), strict=True)
    attended = [  # each [1, H, length, d]
        with_aligned_gradient(
            attend(*(aligned(x).transpose(0, 1).unsqueeze(0) for x in document), is_causal=True, enable_gqa=grouped)
        )
        for document in documents
    ]
    # A fused kernel lays its result out as [1, length, H, d].
    return torch.cat([x.transpose(1, 2) for x in attended], dim=1).squeeze(0)[..., :value_width]  # [T, H, d_v]


class _Widened(Function):
    @staticmethod
    def forward(ctx, v: Tensor, before: int) -> Tensor:
        ctx.before = before
        return v.as_strided((*v.shape[:2], before + v.shape[2]), v.stride(), v.storage_offset() - before)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad[..., ctx.before :], None


def _widened(v: Tensor, before: int) -> Tensor:
    """Values with `before` columns in front of them: [T, H_kv, d_v] -> [T, H_kv, before + d_v].

    The values of latent attention follow channels of their head's key in memory. These are taken as they are: what they
    contribute is cut off, so they get no gradient. In front of other values are zeros, which takes a copy.
    """
    row = v.stride(1)
    if v.stride(2) == 1 and row >= before + v.shape[2] and v.storage_offset() % row >= before:
        return _Widened.apply(v, before)
    return F.pad(v, (before, 0))


def fused_attention(kernel: VarlenKernel) -> PackedAttention:
    """`kernel` for the dtypes and head widths that it has, the reference for all others (fp32 above all).

    A kernel has one width for queries, keys and values. Narrower values get columns in front, and those of the result
    are cut off.
    """

    def attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, lengths: Sequence[int]) -> Tensor:
        width = q.shape[2]
        if q.dtype not in _HALF or width % _HEAD_WIDTH_MULTIPLE or width > _MAX_HEAD_WIDTH:
            return reference_attention(q, k, v, cu_seqlens, lengths)
        if v.shape[2] == width:
            return kernel(aligned(q), aligned(k), aligned(v), cu_seqlens, max(lengths))  # [T, H, d]
        before = width - v.shape[2]
        attended = kernel(aligned(q), aligned(k), aligned(_widened(v, before)), cu_seqlens, max(lengths))  # [T, H, d]
        return attended[..., before:]  # [T, H, d_v]

    return attention
