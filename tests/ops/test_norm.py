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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_llama(dtype):
    x, weight = inputs(dtype)
    theirs = LlamaRMSNorm(32, eps=1e-6).to(dtype)
    theirs.weight.data.copy_(weight.data)
    their_x = x.detach().clone().requires_grad_()
    ours, expected = rms_norm(x, weight, 1e-6), theirs(their_x)
    assert torch.equal(ours, expected)
    upstream = torch.linspace(-1, 1, ours.numel()).view_as(ours).to(dtype)
    ours.backward(upstream)
    expected.backward(upstream)
    assert torch.equal(x.grad, their_x.grad)
    assert torch.equal(weight.grad, theirs.weight.grad)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="apex RMSNorm needs a CUDA device")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_fused_norm_on_cuda(dtype, tolerance):
    x, weight = (tensor.detach().cuda() for tensor in inputs(dtype))
    ours = choose(torch.device("cuda")).rms_norm(x, weight, 1e-6)
    exact = rms_norm(x.float(), weight.float(), 1e-6)
    torch.testing.assert_close(ours.float(), exact, rtol=tolerance, atol=tolerance)
