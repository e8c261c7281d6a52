"""Products of tokens with a router's weight against fp64."""

import pytest
import torch
from torch import Tensor

from megavl.ops.router import RouterLogits, reference_router_logits, wide_mm, wide_router_logits

T, E, D = 40, 12, 96


def wide_product(left: Tensor, right: Tensor) -> Tensor:
    """What `wide_mm` computes on a GPU."""
    assert left.dtype == right.dtype == torch.bfloat16
    return left.float() @ right.float()


def operands(dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    h, weight, upstream = (torch.randn(*shape, generator=generator).to(device) for shape in ((T, D), (E, D), (T, E)))
    return [h.to(dtype), weight.to(dtype), upstream]


def errors(logits: RouterLogits, dtype: torch.dtype, device: str = "cpu") -> list[float]:
    """Of the logits and the gradients of both operands, relative to the largest value of each."""
    h, weight, upstream = operands(dtype, device)
    leaves = h.requires_grad_(), weight.requires_grad_()
    output = logits(*leaves)
    assert output.dtype == torch.float32
    found = [output.detach(), *torch.autograd.grad(output, leaves, upstream)]
    assert [each.dtype for each in found] == [torch.float32, dtype, dtype]
    h, weight, upstream = (x.detach().double() for x in (h, weight, upstream))
    exact = [h @ weight.T, upstream @ weight, upstream.T @ h]
    return [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, exact, strict=True)]


@pytest.mark.parametrize("logits", [reference_router_logits, wide_router_logits(wide_product)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errors(logits, dtype):
    output, for_h, for_weight = errors(logits, dtype)
    rounding = 4e-3 if dtype == torch.bfloat16 else 1e-6
    assert output < 1e-6 and max(for_h, for_weight) < rounding  # measured 4.0e-7, and of gradients in bf16 2.5e-3


def rounded_gradient(h: Tensor, weight: Tensor) -> Tensor:
    """With a gradient that is rounded to one bf16 matrix."""
    return wide_router_logits(wide_product)(h, weight).bfloat16().float()


def test_the_gradient_is_not_rounded_before_the_product():
    h, weight, upstream = operands(torch.bfloat16)
    exact = (upstream.double() @ weight.double()).bfloat16()
    unequal = []
    for logits in (wide_router_logits(wide_product), rounded_gradient):
        leaf = h.detach().requires_grad_()
        (found,) = torch.autograd.grad(logits(leaf, weight), leaf, upstream)
        unequal.append((found != exact).float().mean().item())
    ours, rounded = unequal
    assert ours < 0.01 and rounded > 0.1, unequal  # measured 0.003 and 0.41


def test_without_tokens():
    h, weight = (
        torch.empty(0, D, dtype=torch.bfloat16, requires_grad=True),
        operands(torch.bfloat16)[1].requires_grad_(),
    )
    logits = wide_router_logits(wide_product)(h, weight)
    logits.sum().backward()
    assert logits.shape == (0, E) and h.grad.shape == (0, D) and not weight.grad.any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_errors_on_a_gpu():
    output, *gradients = errors(wide_router_logits(wide_mm), torch.bfloat16, "cuda")
    assert output < 1e-6 and max(gradients) < 4e-3
