"""Kernel of Llama's rotary positions against complex multiplication in fp64, and against the reference."""

import pytest
import torch
from torch import Tensor

from megavl.ops.rope import REFERENCE_ROTARY, rotary_tables
from tests.ops.kernels.interpreter import Mistake, error, far_apart, kernels, no_launch, normal, passes, sliced

# Tokens, heads of queries and keys, width. Heads and widths that are no powers of 2; more heads than a tile has.
SIZES = [(1, 1, 1, 2), (5, 3, 1, 6), (7, 5, 3, 40), (3, 70, 2, 128), (4, 6, 1, 64)]
# Worst measured in the interpreter: 7.8e-8 and 3.5e-3; bf16 is rounded once, 2^-9 of a value.
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 4e-3}
MISTAKES = {
    "backward not reversed": ("token_sin = -token_sin", "token_sin = token_sin"),
    "stride of heads": ("q_head_stride,\n        heads", "2 * half,\n        heads"),
    "keys as queries": ("k + token * k_stride", "q + token * k_stride"),
    "first tile only": ("for start in range(0, heads, HEADS)", "for start in range(0, HEADS, HEADS)"),
    "sign": ("second * cos + first * sin", "second * cos - first * sin"),
}


def exact_rotation(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    turns = torch.complex(cos.double(), sin.double())

    def rotated(x: Tensor) -> Tensor:
        turned = torch.complex(*x.chunk(2, dim=-1)) * turns
        return torch.cat((turned.real, turned.imag), -1)

    return rotated(q), rotated(k)


def rotation(sizes: tuple, dtype: torch.dtype, mistake: Mistake | None = None, device="cpu") -> tuple:
    """Error against fp64, and the largest share of a result that differs from the reference's."""
    tokens, heads, k_heads, width = sizes
    fused, reference = kernels("rope", mistake).TRITON_ROTARY.halves, REFERENCE_ROTARY.halves
    q, k = [tokens, heads, width], [tokens, k_heads, width]
    q, k, *upstream = normal(tokens, dtype, q, k, q, k, device=device)
    # Slices of products; gradients come as slices too.
    q, k, upstream = sliced(q, 8, 0), sliced(k, 3, 0), [sliced(upstream[0], 8, 0), upstream[1]]
    cos, sin = rotary_tables(torch.arange(tokens, device=device) * 37, width, 10000.0)
    ours = passes(lambda q, k: fused(q, k, cos, sin), [q, k], upstream)
    theirs = passes(lambda q, k: reference(q, k, cos, sin), [q, k], upstream)
    wide = [each.double() for each in (q, k, *upstream)]
    exact = passes(lambda q, k: exact_rotation(q, k, cos, sin), wide[:2], wide[2:])
    assert [each.dtype for each in ours] == [each.dtype for each in theirs]
    unequal = max((a != b).float().mean().item() for a, b in zip(ours, theirs, strict=True))
    return error(ours, exact), unequal


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_errors(interpreted, sizes, dtype):
    off, unequal = interpreted(rotation, sizes, dtype)
    assert off < TOLERANCES[dtype]
    # In fp32 the reference rounds the sum of two products once; bf16 shows it nowhere.
    assert dtype == torch.float32 or unequal < 0.01, unequal


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_noticed(interpreted, mistake):
    found = [interpreted(rotation, sizes, torch.float32, MISTAKES[mistake]) for sizes in SIZES[2:4]]
    assert max(off for off, _ in found) > 100 * TOLERANCES[torch.float32]


def no_tokens() -> None:
    module = kernels("rope")
    cos, sin = rotary_tables(torch.arange(0), 8, 10000.0)
    q, k = torch.randn(0, 3, 8, requires_grad=True), torch.randn(0, 1, 8)
    with no_launch(module, "rotate_kernel"):
        turned, _ = module.TRITON_ROTARY.halves(q, k, cos, sin)
        turned.sum().backward()
    assert turned.shape == q.grad.shape == (0, 3, 8)


def test_without_tokens_nothing_is_launched(interpreted):
    interpreted(no_tokens)


def one_gradient() -> None:
    """Only the queries are used: the keys' gradient is zeros, and upstream ones may have a stride of 0."""
    rotate = kernels("rope").TRITON_ROTARY.halves
    cos, sin = rotary_tables(torch.arange(4), 8, 10000.0)
    q, k = (torch.randn(4, heads, 8, requires_grad=True) for heads in (2, 1))
    rotate(q, k, cos, sin)[0].sum().backward()
    (expected,) = torch.autograd.grad(REFERENCE_ROTARY.halves(q, k, cos, sin)[0].sum(), q)
    assert torch.equal(q.grad, expected) and not k.grad.any()


def test_an_unused_output(interpreted):
    interpreted(one_gradient)


def far_error() -> float:
    rotate = kernels("rope").TRITON_ROTARY.halves
    cos, sin = rotary_tables(torch.arange(3), 8, 10000.0)
    q, k = normal(0, torch.bfloat16, (3, 2, 8), (3, 1, 8))
    return error(rotate(far_apart(q), far_apart(k), cos, sin), rotate(q, k, cos, sin))


def test_offsets_of_far_rows(interpreted):
    assert interpreted(far_error) == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("sizes", [*SIZES, (4096, 32, 32, 128)], ids=str)
def test_errors_on_a_gpu(sizes, dtype):
    off, _ = rotation(sizes, dtype, device="cuda")
    assert off < TOLERANCES[dtype]
