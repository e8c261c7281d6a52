"""Rows on their way to experts and back, against plain indexing."""

import pytest
import torch
from torch import Tensor

from megavl.ops.permutation import combine, permute, sort_by_expert, spread

T, K, D = 7, 3, 4


def rows_of_tokens() -> tuple[Tensor, Tensor]:
    """`tokens` [T * K] and `places` [T, K] of rows in a random order."""
    order = torch.randperm(T * K, generator=torch.Generator().manual_seed(0))
    return order // K, order.argsort().view(T, K)


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def test_a_token_has_a_row_for_each_choice():
    (tokens, places), x = rows_of_tokens(), random(1, T, D)
    rows = spread(x, tokens, places)
    assert torch.equal(rows, x[tokens])
    assert all(torch.equal(rows[places[:, choice]], x) for choice in range(K))
    assert torch.autograd.gradcheck(lambda x: spread(x, tokens, places), x)


def test_rows_are_weighted_and_added_up():
    (_, places), rows, weights = rows_of_tokens(), random(2, T * K, D), random(3, T, K)
    expected = sum(weights[:, choice, None] * rows[places[:, choice]] for choice in range(K))
    torch.testing.assert_close(combine(rows, weights, places), expected)
    assert torch.autograd.gradcheck(lambda *inputs: combine(*inputs, places), (rows, weights))


def test_a_permutation_is_undone_by_its_inverse():
    rows, order = random(4, T, D), torch.randperm(T, generator=torch.Generator().manual_seed(1))
    inverse = order.argsort()
    assert torch.equal(permute(rows, order, inverse), rows[order])
    assert torch.equal(permute(permute(rows, order, inverse), inverse, order), rows)
    assert torch.autograd.gradcheck(lambda rows: permute(rows, order, inverse), rows)


def test_rows_are_sorted_by_expert():
    order, inverse, counts = sort_by_expert(torch.tensor([4, 0, 4, 2, 0]), 6)
    assert order.tolist() == [1, 4, 3, 0, 2]
    assert inverse.tolist() == [3, 0, 4, 2, 1]
    assert counts.tolist() == [2, 0, 1, 0, 2, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_in_fp32_in_the_order_of_the_choices(dtype):
    tokens, places = rows_of_tokens()
    x, rows, weights = (
        random(5, T, D, dtype=dtype),
        random(6, T * K, D, dtype=dtype),
        random(7, T, K, dtype=torch.float32),
    )
    grad = random(8, T * K, D, dtype=dtype).detach()
    spread(x, tokens, places).backward(grad)
    expected = torch.zeros(T, D)
    for choice in range(K):
        expected += grad[places[:, choice]]
    assert torch.equal(x.grad, expected.to(dtype))
    combined = combine(rows, weights, places)
    assert torch.equal(combined, combine(rows.float(), weights, places).to(dtype))
    upstream = random(9, T, D, dtype=dtype).detach()
    combined.backward(upstream)
    exact = (upstream.double()[:, None] * rows.detach().double()[places]).sum(-1)  # [T, K]
    torch.testing.assert_close(weights.grad.double(), exact, rtol=1e-6, atol=1e-6)  # measured 2.4e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_tokens_there_are_no_rows(dtype):
    tokens, places = torch.empty(0, dtype=torch.int64), torch.empty(0, K, dtype=torch.int64)
    x, weights = torch.empty(0, D, dtype=dtype, requires_grad=True), torch.empty(0, K, requires_grad=True)
    y = combine(spread(x, tokens, places), weights, places)
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, D) and weights.grad.shape == (0, K)
