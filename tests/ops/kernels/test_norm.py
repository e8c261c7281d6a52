"""RMSNorm kernels against the formula in fp64."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from megavl.ops.norm import add_rms_norm, rms_norm
from tests.ops.kernels.interpreter import Mistake, error, far_apart, kernels, no_launch, normal, passes, sliced

EPS = 1e-5
# Odd ones, one of a single row, one with several rows for each program of the backward pass, one that fills blocks.
SIZES = [(1, 3), (3, 7), (11, 70), (37, 129), (8, 64)]
# Worst measured in the interpreter: 3.4e-7 and 4.0e-3; the reference's are 4.6e-7 and 6.4e-3.
# bf16 rounds x / rms and its product with the weight, 2^-9 each.
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 8e-3}
MISTAKES = {
    "no eps": (" / width + eps)", " / width)"),
    "mean over the block": ("tl.sum(wide * wide, 0) / width", "tl.sum(wide * wide, 0) / BLOCK"),
    "no projection": ("scale * (for_unit - unit * (", "scale * (for_unit - 0 * ("),
    "last row left out": ("rows_per_program, rows - first)", "rows_per_program, rows - first - 1)"),
    "part lost": ("part += upstream", "part = upstream"),
    "residual gradient lost": ("for_x += tl.load(total_grad", "for_x += 0 * tl.load(total_grad"),
    "residual not added": ("tl.load(delta + row * delta_stride", "0 * tl.load(delta + row * delta_stride"),
    "stride ignored": ("x + row * x_stride", "x + row * width"),
}


def exact_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(1, keepdim=True) + EPS) * weight


def exact_add_norm(h: Tensor, delta: Tensor, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    # The sum is rounded before it is normalised: the stream is what the next block reads.
    total = h + delta
    rounded = total + (total.to(dtype).double() - total).detach()
    return rounded, exact_norm(rounded, weight)


def norm_errors(rows: int, width: int, dtype: torch.dtype, mistake: Mistake | None = None, device="cpu") -> dict:
    """Errors of the kernels and of the reference against fp64, and the share of values that differ between the two."""
    norms = kernels("norm", mistake).TRITON_NORMS
    x, delta, weight, upstream, total_upstream = normal(
        rows, dtype, (rows, width), (rows, width), (width,), (rows, width), (rows, width), device=device
    )
    x = x * 0.05  # so that eps counts
    exact_add = partial(exact_add_norm, dtype=dtype)
    found = {}
    for name, ours, theirs, formula, operands, grads in (
        ("norm", norms.rms_norm, rms_norm, exact_norm, (sliced(x), weight), [sliced(upstream)]),
        (
            "add",
            norms.add_rms_norm,
            add_rms_norm,
            exact_add,
            (sliced(x), sliced(delta, 1), weight),
            [sliced(total_upstream), upstream],
        ),
        ("add, sum unused", norms.add_rms_norm, add_rms_norm, exact_add, (x, delta, weight), [None, upstream]),
    ):
        exact = passes(
            formula, [each.double() for each in operands], [None if g is None else g.double() for g in grads]
        )
        reference = passes(lambda *each, f=theirs: f(*each, EPS), operands, grads)
        kernel = passes(lambda *each, f=ours: f(*each, EPS), operands, grads)
        assert [each.dtype for each in kernel] == [each.dtype for each in reference]
        outputs = 1 if name == "norm" else 2
        same = all(torch.equal(*pair) for pair in zip(kernel[: outputs - 1], reference[: outputs - 1], strict=True))
        unequal = (kernel[outputs - 1] != reference[outputs - 1]).float().mean().item() if same else 1.0
        found[name] = (error(kernel, exact), error(reference, exact), unequal)
    return found


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(("rows", "width"), SIZES)
def test_errors(interpreted, rows, width, dtype):
    for name, (ours, theirs, unequal) in interpreted(norm_errors, rows, width, dtype).items():
        assert ours < TOLERANCES[dtype], name
        assert ours < 2 * theirs + 1e-6, (name, theirs)
        # bf16 is rounded where the reference rounds it: measured 0; without the first rounding 27 % differ.
        assert dtype == torch.float32 or unequal < 0.02, (name, unequal)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_noticed(interpreted, mistake):
    found = interpreted(norm_errors, 11, 70, torch.float32, MISTAKES[mistake])
    assert max(ours for ours, _, _ in found.values()) > 100 * TOLERANCES[torch.float32]


def test_another_rounding_is_noticed(interpreted):
    once = ("rounded = (wide * scale).to(value.dtype).to(tl.float32)", "rounded = wide * scale")
    _, _, unequal = interpreted(norm_errors, 37, 129, torch.bfloat16, once)["norm"]
    assert unequal > 0.05


def unused_and_empty() -> None:
    module = kernels("norm")
    x, weight = torch.randn(4, 8), torch.randn(8)
    # A frozen weight gets no gradient, and its parts are not computed.
    leaf = x.clone().requires_grad_()
    module.fused_rms_norm(leaf, weight, EPS).sum().backward()
    expected = torch.autograd.grad(exact_norm(leaf.double(), weight.double()).sum(), leaf)[0]
    assert (leaf.grad - expected).abs().max() < 1e-5
    # Only the stream is used.
    h, delta, leaf = (each.clone().requires_grad_() for each in (x, x, weight))
    module.fused_add_rms_norm(h, delta, leaf, EPS)[0].sum().backward()
    assert (h.grad == 1).all() and (delta.grad == 1).all() and leaf.grad is None
    empty, leaf = torch.randn(0, 8, requires_grad=True), weight.clone().requires_grad_()
    with no_launch(module, "forward_kernel", "backward_kernel", "sum_kernel"):
        for output in module.fused_add_rms_norm(empty, torch.randn(0, 8), leaf, EPS):
            assert output.shape == (0, 8)
        module.fused_rms_norm(empty, leaf, EPS).sum().backward()
    assert empty.grad.shape == (0, 8) and torch.equal(leaf.grad, torch.zeros(8))
    # Wider rows than a block holds are the reference's.
    wide = torch.randn(2, 8193)
    assert torch.equal(module.fused_rms_norm(wide, torch.ones(8193), EPS), rms_norm(wide, torch.ones(8193), EPS))


def test_unused_outputs_and_empty_inputs(interpreted):
    interpreted(unused_and_empty)


def far_errors(mistake: Mistake | None = None) -> float:
    norms = kernels("norm", mistake).TRITON_NORMS
    x, weight, upstream = normal(0, torch.bfloat16, (3, 40), (40,), (3, 40))
    near, far = (
        passes(lambda x, w: norms.rms_norm(x, w, EPS), [rows, weight], [upstream]) for rows in (x, far_apart(x))
    )
    return error(far, near)


def test_offsets_of_far_rows(interpreted):
    assert interpreted(far_errors) == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [*SIZES, (4096, 4096), (4099, 2560), (513, 8192)])
def test_errors_on_a_gpu(rows, width, dtype):
    for name, (ours, theirs, _) in norm_errors(rows, width, dtype, device="cuda").items():
        assert ours < 4 * TOLERANCES[dtype] * max(1.0, math.sqrt(rows / 100)), name
        assert ours < 2 * theirs + 1e-5, (name, theirs)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_repeats_its_numbers():
    norms = kernels("norm").TRITON_NORMS
    x, weight, upstream = normal(0, torch.bfloat16, (4096, 2048), (2048,), (4096, 2048), device="cuda")
    first, second = (passes(lambda x, w: norms.rms_norm(x, w, EPS), [x, weight], [upstream]) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
