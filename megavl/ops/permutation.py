"""Gathers and sums of rows on the way of tokens to their experts and back.

A token has one row for each of its k experts. With T tokens, `tokens` int64 [T * k] is the token of each row and
`places` int64 [T, k] the row of each choice; both say the same.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import Function


class _Spread(Function):
    @staticmethod
    def forward(ctx, x: Tensor, tokens: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return x.index_select(0, tokens)  # [T * k, D]

    @staticmethod
    def backward(ctx, grad: Tensor):
        (places,) = ctx.saved_tensors
        dtype = torch.promote_types(grad.dtype, torch.float32)
        total = grad.new_zeros(len(places), *grad.shape[1:], dtype=dtype)  # [T, D]
        # In the order of the choices: atomic additions would give another sum in every run.
        for choice in places.unbind(1):
            total += grad.index_select(0, choice)
        return total.to(grad.dtype), None, None


def spread(x: Tensor, tokens: Tensor, places: Tensor) -> Tensor:
    """The rows of each token, [T, D] -> [T * k, D]. The gradients of a token's rows are added up in at least fp32."""
    return _Spread.apply(x, tokens, places)


class _Combine(Function):
    @staticmethod
    def forward(ctx, rows: Tensor, weights: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weights, places)
        total = weights.new_zeros(len(places), rows.shape[1])  # [T, D]
        # Choice by choice: all of them at once would be k times as large in fp32 as the rows are in bf16.
        for weight, choice in zip(weights.unbind(1), places.unbind(1), strict=True):
            total.addcmul_(rows.index_select(0, choice), weight[:, None])
        return total.to(rows.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        rows, weights, places = ctx.saved_tensors
        for_rows, for_weights = torch.empty_like(rows), torch.empty_like(weights)
        grad = grad.to(weights.dtype)
        for index, (weight, choice) in enumerate(zip(weights.unbind(1), places.unbind(1), strict=True)):
            for_rows.index_copy_(0, choice, (grad * weight[:, None]).to(rows.dtype))
            for_weights[:, index] = (grad * rows.index_select(0, choice)).sum(1)
        return for_rows, for_weights, None


def combine(rows: Tensor, weights: Tensor, places: Tensor) -> Tensor:
    """Weighted sum of each token's rows: [T * k, D] and weights float32 [T, k] -> [T, D] in the dtype of the rows. Sums
    are in fp32 and rounded once."""
    return _Combine.apply(rows, weights, places)


class _Permute(Function):
    @staticmethod
    def forward(ctx, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


def permute(rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """The rows [N, D] in another order, int64 [N]; `inverse` undoes it."""
    return _Permute.apply(rows, order, inverse)


def sort_by_expert(experts: Tensor, total: int) -> tuple[Tensor, Tensor, Tensor]:
    """Stable sort of rows by expert.

    Args:
        experts: int64 [N], the expert of each row, in [0, total)
        total: number of experts

    Returns:
        order: int64 [N], the row at each place, rows of one expert as they are in `experts`
        inverse: int64 [N], the place of each row
        counts: int64 [total], rows of each expert
    """
    order = experts.argsort(stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    counts = torch.zeros(total, dtype=torch.int64, device=experts.device)
    counts.scatter_add_(0, experts, torch.ones_like(experts))
    return order, inverse, counts


@dataclass(frozen=True)
class Permutation:
    """One implementation of the operations; the first three have a derivative."""

    spread: Callable[[Tensor, Tensor, Tensor], Tensor]
    combine: Callable[[Tensor, Tensor, Tensor], Tensor]
    permute: Callable[[Tensor, Tensor, Tensor], Tensor]
    sort_by_expert: Callable[[Tensor, int], tuple[Tensor, Tensor, Tensor]]


REFERENCE_PERMUTATION = Permutation(spread, combine, permute, sort_by_expert)
