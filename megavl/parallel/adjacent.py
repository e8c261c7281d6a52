"""Weights that lie end to end in memory as one weight, and the columns of its product.

DeepSpeed's flat buffers hold the parameters of an optimizer group in the order of their names, so the weights of layers
that share an input follow each other there. One product with all of them takes the place of one for each; the gradient
of the input is then summed in fp32 within one product, and rounded once.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import Function


def are_adjacent(parts: Sequence[Tensor], dim: int) -> bool:
    """Whether memory holds the concatenation of `parts` along `dim`: they share a storage and their strides, and each
    begins where the one before ends."""
    first, end = parts[0], parts[0].storage_offset()
    for part in parts:
        if (
            part.storage_offset() != end
            or part.stride() != first.stride()
            or part.dtype != first.dtype
            or part.untyped_storage() is not first.untyped_storage()
        ):
            return False
        end += part.shape[dim] * part.stride(dim)
    return True


def _spanned(parts: Sequence[Tensor], dim: int) -> Tensor:
    """The concatenation of adjacent parts along `dim`, a view."""
    shape = list(parts[0].shape)
    shape[dim] = sum(part.shape[dim] for part in parts)
    return parts[0].as_strided(shape, parts[0].stride())


class _JoinRows(Function):
    @staticmethod
    def forward(ctx, *weights: Tensor) -> Tensor:
        ctx.rows = [len(weight) for weight in weights]
        return _spanned(weights, dim=0)  # [sum of rows, d]

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad.split(ctx.rows)  # [rows, d] each


def join_rows(weights: Sequence[Tensor]) -> Tensor:
    """Adjacent weights [rows, d] -> [sum of rows, d]. Neither direction copies: the result and the gradients of the
    weights are views."""
    return _JoinRows.apply(*weights)


class _SplitColumns(Function):
    @staticmethod
    def forward(ctx, x: Tensor, widths: Sequence[int]) -> tuple[Tensor, ...]:
        return x.split(widths, dim=1)  # [T, width] each

    @staticmethod
    def backward(ctx, *grads: Tensor):
        return _spanned(grads, dim=1) if are_adjacent(grads, dim=1) else torch.cat(grads, dim=1), None


def split_columns(x: Tensor, widths: Sequence[int]) -> tuple[Tensor, ...]:
    """[T, sum of widths] -> [T, width] of each, views. Backward concatenates the gradients, without a copy if they are
    adjacent columns already."""
    return _SplitColumns.apply(x, widths)
