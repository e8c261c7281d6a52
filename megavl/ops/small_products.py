"""bf16 products on a CPU that are faster in fp32: small ones, and all where the CPU has no bf16 unit.

torch hands each bf16 product of a CPU to oneDNN, whose set-up takes about 10 us; MKL's fp32 product has next to none.
The CPU's fused attention calls one for each head and block of keys: 25 tokens of width 24 take 2.8 times as long in
bf16 as in fp32. Measured on a Xeon with AMX, where bf16 is faster from about 2^14 elements on.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Elements of a matrix: the keys of one head, the weight of one expert.
_SMALL_ELEMENTS = 2**14


def faster_in_fp32(x: Tensor, elements: int) -> bool:
    """Whether products of `x` with matrices of `elements` elements are faster in fp32."""
    if x.device.type != "cpu" or x.dtype != torch.bfloat16:
        return False
    return elements < _SMALL_ELEMENTS or not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def attend(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    """`scaled_dot_product_attention` of q [B, H, N, d], k [B, H_kv, M, d] and v [B, H_kv, M, d] -> [B, H, N, d]."""
    if not faster_in_fp32(q, k.shape[2] * k.shape[3]):
        return F.scaled_dot_product_attention(q, k, v, **options)
    return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), **options).to(q.dtype)
