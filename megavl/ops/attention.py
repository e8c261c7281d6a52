"""Causal attention over packed documents: no padding, and no document sees another.

Every implementation has one signature, `PackedAttention`:
    q: [T, H, d]; k: [T, H_kv, d]; v: [T, H_kv, d_v], with H_kv a divisor of H (grouped queries, arXiv 2305.13245)
       and d_v at most d
    cu_seqlens: int32 [N + 1]; document n is rows cu_seqlens[n]:cu_seqlens[n + 1]; the last entry is T
    returns [T, H, d_v], scores scaled by 1 / sqrt(d)
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

PackedAttention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
# A kernel reads also the length of the longest document, or any upper bound of it.
VarlenKernel = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]

# What both FlashAttention builds serve.
_HALF = (torch.float16, torch.bfloat16)
_HEAD_WIDTH_MULTIPLE, _MAX_HEAD_WIDTH = 8, 256


def reference_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """One causal `scaled_dot_product_attention` per document: exact, any device and dtype."""
    lengths = cu_seqlens.diff().tolist()
    grouped = q.shape[1] != k.shape[1]
    documents = zip(*(x.transpose(0, 1).unsqueeze(0).split(lengths, dim=2) for x in (q, k, v)), strict=True)
    attended = [  # each [1, H, length, d_v]
        F.scaled_dot_product_attention(*document, is_causal=True, enable_gqa=grouped) for document in documents
    ]
    return torch.cat(attended, dim=2).squeeze(0).transpose(0, 1)  # [T, H, d_v]


def fused_attention(kernel: VarlenKernel) -> PackedAttention:
    """`kernel` for the dtypes and head widths that it has, the reference for all others (fp32 above all).

    A kernel has one width for queries, keys and values; narrower values are filled up with zeros, and so is what comes
    of them, which is cut off again.
    """

    def attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
        width = q.shape[2]
        if q.dtype not in _HALF or width % _HEAD_WIDTH_MULTIPLE or width > _MAX_HEAD_WIDTH:
            return reference_attention(q, k, v, cu_seqlens)
        # T bounds the longest document. The true length lies on the device: to read it would stall the launch queue in
        # every block, while the thread blocks beyond a document's end return at once.
        attended = kernel(q, k, F.pad(v, (0, width - v.shape[2])), cu_seqlens, q.shape[0])  # [T, H, d]
        return attended[..., : v.shape[2]]  # [T, H, d_v]

    return attention
