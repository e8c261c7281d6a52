"""varlen_attn under each supported version of torch, by stand-ins with its two signatures."""

import pytest
import torch
from torch import Tensor

from megavl.ops.attention import reference_attention
from megavl.ops.versions import causal_varlen

KV_HEADS = 2
LENGTHS = (3, 4)


def of_torch_2_12(calls: list):
    """The signature of torch 2.12 and 2.13, cut to the parameters that a caller may know."""

    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False):
        assert enable_gqa or query.shape[1] == key.shape[1], "torch refuses grouped queries unless they are announced"
        calls.append((max_q, max_k, window_size, cu_seq_q is cu_seq_k, key.shape[1]))
        return reference_attention(query, key, value, cu_seq_q, LENGTHS)

    return varlen_attn


def of_torch_2_11(calls: list):
    """Without enable_gqa: one number of heads."""

    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1)):
        assert query.shape[1] == key.shape[1] == value.shape[1]
        calls.append((max_q, max_k, window_size, cu_seq_q is cu_seq_k, key.shape[1]))
        return reference_attention(query, key, value, cu_seq_q, LENGTHS)

    return varlen_attn


def attended(attention, heads: int, lengths: int | tuple[int, ...]) -> tuple[Tensor, ...]:
    """Output and gradients of q, k, v for two documents."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(7, each, 8, generator=generator, dtype=torch.float64).requires_grad_()
        for each in (heads, KV_HEADS, KV_HEADS)
    )
    out = attention(q, k, v, torch.tensor([0, 3, 7], dtype=torch.int32), lengths)
    out.square().sum().backward()
    return out.detach(), q.grad, k.grad, v.grad


@pytest.mark.parametrize("heads", [KV_HEADS, 3 * KV_HEADS])
@pytest.mark.parametrize("torchs", [of_torch_2_11, of_torch_2_12])
def test_grouped_queries_are_served(torchs, heads):
    calls: list = []
    ours = attended(causal_varlen(torchs(calls)), heads, max(LENGTHS))
    # Worst error of repeated keys and values against grouped ones, in fp64: 2.3e-16 relative.
    for got, expected in zip(ours, attended(reference_attention, heads, LENGTHS), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert calls == [(4, 4, (-1, 0), True, heads if torchs is of_torch_2_11 else KV_HEADS)]
