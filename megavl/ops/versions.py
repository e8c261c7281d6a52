"""Parameters of torch's `varlen_attn`, which differ between the supported versions of torch (2.11 to 2.13).

`enable_gqa` exists since torch 2.12. Torch 2.11 documents one number of heads for queries, keys and values, so keys and
values are repeated there. All three versions select causal attention by `window_size=(-1, 0)`.
"""

from collections.abc import Callable
from inspect import signature

from torch import Tensor

_CAUSAL = (-1, 0)


def causal_varlen(varlen_attn: Callable[..., Tensor]) -> Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]:
    """`varlen_attn` as a causal kernel for grouped queries.

    Returns:
        A function of q [T, H, d], k and v [T, H_kv, d], cu_seqlens int32 [N + 1] and an upper bound of the document
        lengths; it returns [T, H, d].
    """
    if "enable_gqa" in signature(varlen_attn).parameters:

        def kernel(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
            grouped = q.shape[1] != k.shape[1]
            return varlen_attn(
                q, k, v, cu_seqlens, cu_seqlens, longest, longest, window_size=_CAUSAL, enable_gqa=grouped
            )

        return kernel

    def repeating_kernel(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
        repeats = q.shape[1] // k.shape[1]
        if repeats > 1:
            k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))  # [T, H, d]
        return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, window_size=_CAUSAL)

    return repeating_kernel
