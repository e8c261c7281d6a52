"""RMSNorm against transformers' LlamaRMSNorm."""

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from megavl.ops.dispatch import choose
from megavl.ops.norm import rms_norm


def inputs(dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(11, 32, generator=generator)
    return x.to(dtype).requires_grad_(), torch.randn(32, generator=generator).to(dtype).requires_grad_()


def derivatives(norm, dtype: torch.dtype) -> list[torch.Tensor]:
    """Result and gradients of x and weight, in fp64; `norm` takes x and weight."""
    x, weight = (tensor.detach().to(dtype).requires_grad_() for tensor in inputs(torch.bfloat16))
    out = norm(x, weight)
    out.backward(torch.linspace(-1, 1, out.numel()).view_as(out).to(dtype))
    return [tensor.double() for tensor in (out.detach(), x.grad, weight.grad)]


def llama(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    norm = LlamaRMSNorm(32, eps=1e-6)
    del norm.weight
    norm.weight = weight
    return norm(x)


def exact(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight * x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-7), (torch.bfloat16, 6e-3)])
def test_is_as_exact_as_llama(dtype, tolerance):
    """Measured, relative to the largest value: 1.1e-7 and 3.4e-3, Llama's 1.4e-7 and 4.2e-3."""
    expected = derivatives(exact, torch.float64)

    def errors(norm) -> list[float]:
        found = derivatives(norm, dtype)
        return [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, expected, strict=True)]

    ours, theirs = errors(lambda x, weight: rms_norm(x, weight, 1e-6)), errors(llama)
    assert all(our <= max(their, tolerance) for our, their in zip(ours, theirs, strict=True))
    assert min(errors(lambda x, weight: rms_norm(x, weight, 1.0))) > 2 * tolerance


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="apex RMSNorm needs a CUDA device")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_fused_norm_on_cuda(dtype, tolerance):
    x, weight = (tensor.detach().cuda() for tensor in inputs(dtype))
    ours = choose(torch.device("cuda")).rms_norm(x, weight, 1e-6)
    exact = rms_norm(x.float(), weight.float(), 1e-6)
    torch.testing.assert_close(ours.float(), exact, rtol=tolerance, atol=tolerance)
