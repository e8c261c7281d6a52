"""Packed attention: the reference against a dense softmax over a mask, and the fused kernels against the reference."""

import pytest
import torch

from megavl.ops.attention import fused_attention, reference_attention
from megavl.ops.dispatch import choose

LENGTHS = (5, 1, 9, 4)


def random_qkv(
    heads: int, kv_heads: int, width: int = 8, dtype=torch.float32, device="cpu", value_width: int | None = None
):
    """q [T, heads, width], k and v [T, kv_heads, width], each a leaf that wants a gradient, and cu_seqlens."""
    generator = torch.Generator().manual_seed(0)
    total = sum(LENGTHS)
    qkv = [
        torch.randn(total, count, channels, generator=generator).to(device, dtype).requires_grad_()
        for count, channels in ((heads, width), (kv_heads, width), (kv_heads, value_width or width))
    ]
    return qkv, torch.tensor((0, *LENGTHS)).cumsum(0).to(device, torch.int32)


def dense_attention(q, k, v, cu_seqlens, lengths):
    """Softmax over all T keys, the mask made from document numbers and positions."""
    total, heads, width = q.shape
    token = torch.arange(total)
    document = torch.bucketize(token, cu_seqlens[1:], right=True)
    visible = (document[:, None] == document) & (token[:, None] >= token)  # [T, T]
    k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))  # [T, heads, width]
    scores = torch.einsum("qhd,khd->hqk", q, k) / width**0.5
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~visible, float("-inf")).softmax(-1), v)


def outputs_and_gradients(attention, qkv, cu_seqlens):
    out = attention(*qkv, cu_seqlens, LENGTHS)
    weights = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out).to(out.dtype)
    return [out, *torch.autograd.grad((out * weights).sum(), qkv)]


@pytest.mark.parametrize(("kv_heads", "value_width"), [(4, 8), (2, 8), (1, 8), (4, 5)])
def test_reference_is_masked_softmax(kv_heads, value_width):
    qkv, cu_seqlens = random_qkv(4, kv_heads, value_width=value_width)
    ours = outputs_and_gradients(reference_attention, qkv, cu_seqlens)
    dense = outputs_and_gradients(dense_attention, qkv, cu_seqlens)
    error = max((a - b).abs().max().item() for a, b in zip(ours, dense, strict=True))
    assert error < 5e-6  # measured 4.8e-7


def test_gradients_of_narrow_values_in_fp64():
    qkv, cu_seqlens = random_qkv(2, 2, dtype=torch.float64, value_width=5)
    assert torch.autograd.gradcheck(lambda *x: reference_attention(*x, cu_seqlens, LENGTHS), qkv)


def test_narrow_values_take_the_fused_kernel_of_a_cpu():
    qkv, cu_seqlens = random_qkv(2, 2, value_width=5)
    with torch.profiler.profile() as profile:
        reference_attention(*qkv, cu_seqlens, LENGTHS)
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["aten::_scaled_dot_product_flash_attention_for_cpu"] == len(LENGTHS)
    assert "aten::_scaled_dot_product_attention_math" not in counts


def test_a_kernel_gets_values_as_wide_as_queries():
    """And the result is that of the narrow values, gradients included."""
    widths = []

    def kernel(q, k, v, cu_seqlens, longest):
        widths.append((q.shape[2], k.shape[2], v.shape[2]))
        return reference_attention(q, k, v, cu_seqlens, LENGTHS)

    qkv, cu_seqlens = random_qkv(4, 4, 24, torch.bfloat16, value_width=16)
    padded = outputs_and_gradients(fused_attention(kernel), qkv, cu_seqlens)
    narrow = outputs_and_gradients(reference_attention, qkv, cu_seqlens)
    assert widths == [(24, 24, 24)]
    assert padded[0].shape == (sum(LENGTHS), 4, 16)
    for ours, theirs in zip(padded, narrow, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-2)  # measured 7.8e-3: one step of bfloat16


def test_values_that_follow_keys_in_memory_are_widened_without_a_copy():
    """Values of latent attention. The columns in front of them count neither in the result nor in a gradient."""
    got = []

    def kernel(q, k, v, cu_seqlens, longest):
        got.append((v.data_ptr(), v.shape, v.stride()))
        return reference_attention(q, k, v, cu_seqlens, LENGTHS)

    def from_joint(attention):
        """Of q, k and of the product that the values, 16 columns of 32, are the last of."""
        (q, k, kv), cu_seqlens = random_qkv(4, 4, 24, torch.bfloat16, value_width=32)

        def attend(q, k, kv, *documents):
            return attention(q, k, kv[..., 16:], *documents)

        return kv, outputs_and_gradients(attend, (q, k, kv), cu_seqlens)

    kv, found = from_joint(fused_attention(kernel))
    _, expected = from_joint(reference_attention)
    assert got == [(kv.data_ptr() + 2 * (16 - 8), (sum(LENGTHS), 4, 24), kv.stride())]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-2)  # measured 7.8e-3: one step of bfloat16
    assert not found[-1][..., :16].any() and found[-1][..., 16:].any()


@pytest.mark.parametrize("begin", [0, 4])
def test_values_without_enough_columns_in_front_are_copied(begin):
    """At the start of a row the columns in front would be those of another head, and of the first one none at all."""
    got = []

    def kernel(q, k, v, cu_seqlens, longest):
        got.append(v)
        return reference_attention(q, k, v, cu_seqlens, LENGTHS)

    (q, k, kv), cu_seqlens = random_qkv(4, 4, 24, torch.bfloat16, value_width=32)
    v = kv[..., begin : begin + 16]
    found = fused_attention(kernel)(q, k, v, cu_seqlens, LENGTHS)
    (wide,) = got
    assert torch.equal(wide[..., 8:], v) and not wide[..., :8].any()
    torch.testing.assert_close(found, reference_attention(q, k, v, cu_seqlens, LENGTHS), rtol=0, atol=2e-2)  # as above


def test_a_kernel_gets_columns_of_a_joint_product_as_they_are():
    """Rows further apart than they are wide, without a copy."""
    got = []

    def kernel(q, k, v, cu_seqlens, longest):
        got.extend((x.data_ptr(), x.stride()) for x in (q, k, v))
        return reference_attention(q, k, v, cu_seqlens, LENGTHS)

    (q, k, v), cu_seqlens = random_qkv(4, 2, dtype=torch.bfloat16)
    joint = torch.cat([x.detach().flatten(1) for x in (q, k, v)], dim=1)  # [T, (4 + 2 + 2) * 8]
    columns = [x.unflatten(1, (-1, 8)).requires_grad_() for x in joint.split((32, 16, 16), dim=1)]
    found = outputs_and_gradients(fused_attention(kernel), columns, cu_seqlens)
    expected = outputs_and_gradients(reference_attention, (q, k, v), cu_seqlens)
    assert got == [(joint.data_ptr() + begin, (64, 8, 1)) for begin in (0, 64, 96)]
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_operands_and_gradients_of_the_reference_are_aligned(monkeypatch):
    """Values that are a slice of a wider tensor, and documents that begin anywhere among rows of 24 bytes: on a GPU
    their kernels fail on such an address."""
    begins, attend = [], torch.nn.functional.scaled_dot_product_attention

    def recorded(*operands, **options):
        begins.extend(operand.storage_offset() * operand.element_size() for operand in operands)
        out = attend(*operands, **options)
        out.register_hook(lambda grad: begins.append(grad.storage_offset() * grad.element_size()))
        return out

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recorded)
    (q, k, _), cu_seqlens = random_qkv(1, 1, width=6)
    kv = torch.randn(sum(LENGTHS), 1, 13, requires_grad=True)
    outputs_and_gradients(lambda *x: reference_attention(*x), (q, k, kv[..., 7:]), cu_seqlens)
    assert len(begins) == 4 * len(LENGTHS)
    assert not any(begin % 16 for begin in begins)


def test_documents_do_not_see_each_other():
    qkv, cu_seqlens = random_qkv(4, 4)
    q, k, v = (x.detach() for x in qkv)
    before = reference_attention(q, k, v, cu_seqlens, LENGTHS)
    k[7], v[7] = 9.0, 9.0  # second token of the third document
    changed = (reference_attention(q, k, v, cu_seqlens, LENGTHS) != before).any(-1).any(-1)
    assert changed.nonzero().squeeze(1).tolist() == list(range(7, 15))
    one_document = reference_attention(q, k, v, torch.tensor([0, 19], dtype=torch.int32), (19,))
    assert not torch.allclose(one_document, before)


def test_lengths_that_do_not_cover_the_tokens_are_refused():
    (q, k, v), _ = random_qkv(4, 4)
    with pytest.raises(RuntimeError, match="split"):
        reference_attention(q, k, v, torch.tensor([0, 5], dtype=torch.int32), (5,))


@pytest.mark.parametrize(
    ("dtype", "width", "fused"),
    [
        (torch.bfloat16, 8, True),
        (torch.float16, 128, True),
        (torch.float32, 8, False),
        (torch.bfloat16, 4, False),
        (torch.bfloat16, 264, False),
    ],
)
def test_a_kernel_gets_what_it_can_compute(dtype, width, fused):
    calls = []

    def kernel(q, k, v, cu_seqlens, longest):
        calls.append(longest)
        return reference_attention(q, k, v, cu_seqlens, LENGTHS)

    qkv, cu_seqlens = random_qkv(4, 2, width, dtype)
    out = fused_attention(kernel)(*qkv, cu_seqlens, LENGTHS)
    assert torch.equal(out, reference_attention(*qkv, cu_seqlens, LENGTHS))
    assert bool(calls) == fused
    assert set(calls) <= {max(LENGTHS)}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="fused attention needs a CUDA device")
@pytest.mark.parametrize(
    ("kv_heads", "width", "value_width", "before"),
    [(4, 64, 64, 0), (2, 64, 64, 0), (4, 192, 128, 0), (4, 192, 128, 128)],
)
def test_fused_kernel_on_cuda(kv_heads, width, value_width, before):
    """before: columns in front of the values in memory"""
    device = torch.device("cuda")
    half, cu_seqlens = random_qkv(4, kv_heads, width, torch.bfloat16, device, before + value_width)
    full = [x.detach().float().requires_grad_() for x in half]

    def of_columns(attention):
        return lambda q, k, v, *documents: attention(q, k, v[..., before:], *documents)

    fused = outputs_and_gradients(of_columns(choose(device).attention), half, cu_seqlens)
    exact = outputs_and_gradients(of_columns(reference_attention), full, cu_seqlens)
    for ours, theirs in zip(fused, exact, strict=True):
        # bfloat16 holds 8 bits: one rounding of the result, some of the factors
        torch.testing.assert_close(ours.float(), theirs, rtol=2e-2, atol=2e-2)
