"""bf16 products through fp32: rounded once, in both directions, and nothing else is touched."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from megavl.ops.products import Float32Products, Float32Sums, products


def leaf(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16().requires_grad_()


PRODUCTS = {
    "linear": (lambda x, w: F.linear(x, w), (7, 16), (5, 16)),
    "matmul": (lambda x, w: x @ w, (7, 16), (16, 5)),
    "einsum": (lambda x, w: torch.einsum("ij,kj->ik", x, w), (7, 16), (5, 16)),
    "conv2d": (lambda x, w: F.conv2d(x, weight=w, stride=2), (2, 3, 8, 8), (4, 3, 2, 2)),
    "attention": (
        lambda q, k: F.scaled_dot_product_attention(q, k, value=k.detach(), is_causal=True),
        (1, 2, 6, 8),
        (1, 2, 6, 8),
    ),
}


@pytest.mark.parametrize(("product", "first", "second"), PRODUCTS.values(), ids=PRODUCTS)
def test_value_and_gradients_are_those_of_fp32_rounded_once(product, first, second):
    x, w = leaf(*first, seed=0), leaf(*second, seed=1)
    with Float32Products():
        y = product(x, w)
    upstream = leaf(*y.shape, seed=2).detach()
    y.backward(upstream)

    x32, w32 = (tensor.detach().float().requires_grad_() for tensor in (x, w))
    y32 = product(x32, w32)
    y32.backward(upstream.float())
    assert y.dtype == x.grad.dtype == w.grad.dtype == torch.bfloat16
    # Bit for bit: the same fp32 kernels on the same numbers, and one rounding.
    for mine, exact in ((y, y32), (x.grad, x32.grad), (w.grad, w32.grad)):
        assert torch.equal(mine, exact.bfloat16())


def test_modules_come_through_it_and_other_operations_do_not():
    linear = nn.Linear(16, 16).bfloat16()
    x = leaf(4, 16, seed=0)
    with Float32Products():
        y = linear(x)
        summed = x + x
    assert torch.equal(y, F.linear(x.float(), linear.weight.float(), linear.bias.float()).bfloat16())
    assert summed.dtype == torch.bfloat16


def test_other_precisions_are_left_alone():
    x = torch.ones(3, 4, dtype=torch.float64)
    with Float32Products():
        assert F.linear(x, x).dtype == torch.float64
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_choice():
    context, line = products(torch.device("cpu"))
    through_fp32 = not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert isinstance(context, Float32Products) == through_fp32 and ("fp32" in line) == through_fp32
    context, line = products(torch.device("cuda"))
    assert not isinstance(context, Float32Products) and line == "torch, sums of bf16 products in fp32"


def test_sums_on_a_gpu_are_in_fp32_while_it_is_asked_for():
    context, line = products(torch.device("cuda"))
    assert isinstance(context, Float32Sums) and "fp32" in line
    settings, before = torch.backends.cuda.matmul, torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    with context:
        assert not settings.allow_bf16_reduced_precision_reduction
        with context:  # a recomputed block
            pass
        assert not settings.allow_bf16_reduced_precision_reduction
    assert settings.allow_bf16_reduced_precision_reduction == before
