"""Causal attention over packed documents: no padding, and no document sees another.

Every implementation has one signature, `PackedAttention`:
    q: [T, H, d]; k, v: [T, H_kv, d] with H_kv a divisor of H (grouped queries, arXiv 2305.13245)
    cu_seqlens: int32 [N + 1]; document n is rows cu_seqlens[n]:cu_seqlens[n + 1]; the last entry is T
    returns [T, H, d], scores scaled by 1 / sqrt(d)
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
    attended = [  # each [1, H, length, d]
        F.scaled_dot_product_attention(*document, is_causal=True, enable_gqa=grouped) for document in documents
    ]
    return torch.cat(attended, dim=2).squeeze(0).transpose(0, 1)  # [T, H, d]


def fused_attention(kernel: VarlenKernel) -> PackedAttention:
    """`kernel` for the dtypes and head widths that it has, the reference for all others (fp32 above all)."""

    def attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
        width = q.shape[2]
        if q.dtype not in _HALF or width % _HEAD_WIDTH_MULTIPLE or width > _MAX_HEAD_WIDTH:
            return reference_attention(q, k, v, cu_seqlens)
        # T bounds the longest document. The true length lies on the device: to read it would stall the launch queue in
        # every block, while the thread blocks beyond a document's end return at once.
        return kernel(q, k, v, cu_seqlens, q.shape[0])

    return attention
