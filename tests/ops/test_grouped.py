"""Grouped products against one product per row, and the kernel against the loop: value and both gradients."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megavl.ops.grouped import Groups, grouped_gemm_linear, grouped_mm_linear, reference_grouped_linear
from megavl.ops.products import Float32Sums

COUNTS = {
    "some": [3, 0, 7, 1, 0],
    "all to one": [0, 0, 0, 11, 0],
}
# torch's kernel for CPUs shares its derivative and its rules with that for GPUs.
DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
    ),
]


def inputs(counts: list[int], d_in: int, d_out: int, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, ...]:
    """x, weight, counts, and the gradient of the output, in no common memory layout."""
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(sum(counts)))
    x = draw(sum(counts), d_in).to(device, dtype).requires_grad_()
    weight = (draw(len(counts), d_out, d_in) / d_in**0.5).to(device, dtype).requires_grad_()
    upstream = draw(d_out, sum(counts)).to(device, dtype).t()  # [N, d_out]
    return x, weight, torch.tensor(counts, device=device), upstream


def results(product, x: Tensor, weight: Tensor, counts: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
    """Output and both gradients."""
    y = product(x, weight, Groups(counts))
    return y, *torch.autograd.grad(y, (x, weight), upstream)


def per_row(x: Tensor, weight: Tensor, groups: Groups) -> Tensor:
    expert = torch.arange(len(weight)).repeat_interleave(torch.tensor(groups.sizes)).to(x.device)  # [N]
    return torch.einsum("noi,ni->no", weight[expert], x)


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_the_reference_is_one_product_per_row(counts):
    case = inputs(counts, 5, 9, torch.float64)
    for ours, theirs in zip(results(reference_grouped_linear, *case), results(per_row, *case), strict=True):
        torch.testing.assert_close(ours, theirs)
    _, _, for_weight = results(reference_grouped_linear, *case)
    assert all(for_weight[expert].abs().max() == 0 for expert, count in enumerate(counts) if count == 0)


def test_frozen_experts_have_no_gradient_in_the_loop():
    x, weight, counts, upstream = inputs(COUNTS["some"], 5, 9, torch.float64)
    y = reference_grouped_linear(x, weight.detach(), Groups(counts))
    (frozen,) = torch.autograd.grad(y, x, upstream)
    assert torch.equal(frozen, results(reference_grouped_linear, x, weight, counts, upstream)[1])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("counts", [*COUNTS.values(), [300, 0, 1, 129, 0, 64, 0, 18]], ids=[*COUNTS, "many"])
@pytest.mark.parametrize("clears_empty", [False, True])
def test_the_kernel_gives_what_the_loop_gives(counts, clears_empty, device):
    if device == "cuda" and not clears_empty and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("only Hopper's kernel writes the gradients of experts without rows")
    kernel_gives_what_the_loop_gives(grouped_mm_linear(clears_empty), counts, device)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("counts", [*COUNTS.values(), [300, 0, 1, 129, 0, 64, 0, 18]], ids=[*COUNTS, "many"])
def test_the_library_gives_what_the_loop_gives(counts):
    library = pytest.importorskip("grouped_gemm.ops")
    kernel_gives_what_the_loop_gives(grouped_gemm_linear(library.gmm), counts, "cuda")


def kernel_gives_what_the_loop_gives(product, counts: list[int], device: str) -> None:
    case = inputs(counts, 64, 96, torch.bfloat16, device)
    exact = results(per_row, *(tensor.double() if tensor.is_floating_point() else tensor for tensor in case))
    # Without it cuBLAS may round the parts of a sum over 300 rows to bf16 before it adds them.
    with Float32Sums():
        loop = results(reference_grouped_linear, *case)
        kernel = results(product, *case)
    for theirs, ours, truth in zip(loop, kernel, exact, strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        # Both round a sum in fp32 once to bf16, 2^-9 of it: measured 3.7e-3 of 1 + |x|.
        for result in (ours, theirs):
            assert ((result.double() - truth).abs() <= 6e-3 * (1 + truth.abs())).all()
    assert all(kernel[2][expert].abs().max() == 0 for expert, count in enumerate(counts) if count == 0)


@pytest.mark.parametrize(
    ("d_in", "d_out", "dtype"), [(64, 96, torch.float32), (12, 96, torch.bfloat16), (64, 12, torch.bfloat16)]
)
def test_what_the_kernel_does_not_serve_is_the_loops(d_in, d_out, dtype):
    case = inputs(COUNTS["some"], d_in, d_out, dtype)
    ours, theirs = (results(product, *case) for product in (grouped_mm_linear(False), reference_grouped_linear))
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_frozen_experts_cost_no_product(monkeypatch):
    x, weight, counts, upstream = inputs(COUNTS["some"], 64, 96, torch.bfloat16)
    y = grouped_mm_linear(False)(x, weight.detach(), Groups(counts))
    calls, plain = [], F.grouped_mm
    monkeypatch.setattr(F, "grouped_mm", lambda *factors, offs: calls.append(0) or plain(*factors, offs=offs))
    (frozen,) = torch.autograd.grad(y, x, upstream)
    assert len(calls) == 1
    assert torch.equal(frozen, results(grouped_mm_linear(False), x, weight, counts, upstream)[1])
