"""Autograd pairs at the borders of a tensor-parallel region.

Megatron-LM (arXiv 1909.08053) section 3 names f and g; Megatron sequence parallelism (arXiv 2205.05198) section 4.2
replaces them by all-gather and reduce-scatter over the tokens. With an axis of size 1 each is the identity.

| function       | forward                   | backward                  |
|----------------|---------------------------|---------------------------|
| copy           | identity                  | all-reduce                |
| reduce         | all-reduce                | identity                  |
| split          | this rank's tokens        | all-gather                |
| gather         | all-gather                | reduce-scatter            |
| reduce_scatter | reduce-scatter            | all-gather                |
| join           | all-gather                | this rank's part          |

split and join assume that what follows is computed alike on every rank, so that the gradients are equal as well.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function
from torch.func import functional_call

from megavl.parallel.groups import Axis, TensorAxis
from megavl.parallel.versions import all_gather_single, reduce_scatter_single


def _all_reduce(x: Tensor, axis: Axis) -> Tensor:
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, group=axis.group)
    return x


def _all_gather(x: Tensor, axis: Axis) -> Tensor:
    whole = x.new_empty((axis.size * x.shape[0], *x.shape[1:]))  # [size * T, ...]
    all_gather_single(whole, x.contiguous(), group=axis.group)
    return whole


def _reduce_scatter(x: Tensor, axis: Axis) -> Tensor:
    part = x.new_empty((x.shape[0] // axis.size, *x.shape[1:]))  # [T / size, ...]
    reduce_scatter_single(part, x.contiguous(), group=axis.group)
    return part


def _split(x: Tensor, axis: Axis) -> Tensor:
    return x.chunk(axis.size)[axis.rank].contiguous()  # [T / size, ...]


class _Copy(Function):
    @staticmethod
    def forward(ctx, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _all_reduce(grad, ctx.axis), None


class _Reduce(Function):
    @staticmethod
    def forward(ctx, x: Tensor, axis: Axis) -> Tensor:
        return _all_reduce(x, axis)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None


class _Split(Function):
    @staticmethod
    def forward(ctx, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return _split(x, axis)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _all_gather(grad, ctx.axis), None


class _Gather(Function):
    @staticmethod
    def forward(ctx, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return _all_gather(x, axis)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _reduce_scatter(grad, ctx.axis), None


class _ReduceScatter(Function):
    @staticmethod
    def forward(ctx, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return _reduce_scatter(x, axis)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _all_gather(grad, ctx.axis), None


class _Join(Function):
    @staticmethod
    def forward(ctx, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return _all_gather(x, axis)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _split(grad, ctx.axis), None


def enter_parallel(x: Tensor, tp: TensorAxis) -> Tensor:
    """[T, D] (replicated) or [T / tp, D] (sequence) -> [T, D], the input that column-parallel weights multiply."""
    if tp.size == 1:
        return x
    return _Gather.apply(x, tp) if tp.sequence else _Copy.apply(x, tp)


def leave_parallel(x: Tensor, tp: TensorAxis) -> Tensor:
    """Partial sums [T, D] of row-parallel weights -> [T, D] (replicated) or [T / tp, D] (sequence)."""
    if tp.size == 1:
        return x
    return _ReduceScatter.apply(x, tp) if tp.sequence else _Reduce.apply(x, tp)


def copy(x: Tensor, axis: Axis) -> Tensor:
    """The same on every rank, each of which does something else with it; the gradients are added up."""
    return x if axis.size == 1 else _Copy.apply(x, axis)


def reduce(x: Tensor, axis: Axis) -> Tensor:
    """Sum over the axis; the gradient of the sum is every rank's gradient."""
    return x if axis.size == 1 else _Reduce.apply(x, axis)


def split(x: Tensor, axis: Axis) -> Tensor:
    """[T, ...], equal on all ranks -> [T / size, ...], this rank's part."""
    return x if axis.size == 1 else _Split.apply(x, axis)


def join(x: Tensor, axis: Axis) -> Tensor:
    """The parts [T / size, ...] of all ranks -> [T, ...], with which every rank then continues alike."""
    return x if axis.size == 1 else _Join.apply(x, axis)


def all_gather(x: Tensor, axis: Axis) -> Tensor:
    """The parts [T / size, ...] of all ranks -> [T, ...], without a gradient, as for indices."""
    return x if axis.size == 1 else _all_gather(x, axis)


def split_tokens(x: Tensor, tp: TensorAxis) -> Tensor:
    """[T, D], equal on all ranks -> [T / tp, D] under sequence parallelism, unchanged without."""
    return _Split.apply(x, tp) if tp.sequence else x


def shared_weight(weight: Tensor, tp: TensorAxis) -> Tensor:
    """A replicated weight that meets only this rank's tokens: under sequence parallelism its gradient is a partial sum,
    which the backward pass adds up over the ranks."""
    return _Copy.apply(weight, tp) if tp.sequence else weight


def join_shares(x: Tensor, total: int, axis: Axis) -> Tensor:
    """All-gather of the shares of `total` rows, [share, ...] -> [total, ...]; every rank continues with all rows.

    The shares are those of `megavl.batch.tile_share`. Only the last ones are short, so padding keeps the rows in order.
    A rank with an empty share passes one row, which is cut off with the padding.
    """
    missing = -(-total // axis.size) - len(x)
    if missing:
        x = torch.cat((x, x.new_zeros(missing, *x.shape[1:])))  # [ceil(total / size), ...]
    return _Join.apply(x, axis)[:total]


def summing_gradients(module: nn.Module, axis: Axis) -> Callable[..., Tensor]:
    """`module`, called with a part of the input that the ranks share: the gradients of its parameters, which are whole
    on every rank, are partial sums, which the backward pass adds up. Frozen ones cost nothing."""
    copies = {name: _Copy.apply(weight, axis) for name, weight in module.named_parameters() if weight.requires_grad}
    return lambda *inputs: functional_call(module, copies, inputs)
