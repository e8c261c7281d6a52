"""Collectives at the borders of a tensor-parallel region, each with its backward.

Megatron-LM (arXiv 1909.08053) section 3 names f and g, here `copy` and `reduce`; Megatron sequence parallelism (arXiv
2205.05198) section 4.2 replaces them by all-gather and reduce-scatter over the tokens. The constants from `copy` to
`join` are the table of both directions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call

from megavl.parallel.autograd import with_backward
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


def _slice(x: Tensor, axis: Axis) -> Tensor:
    return x.chunk(axis.size)[axis.rank].contiguous()  # [T / size, ...]


def _identity(x: Tensor, axis: Axis) -> Tensor:
    return x.view_as(x)


@dataclass(frozen=True)
class _Collective:
    """What happens to a tensor over an axis, and to its gradient. Identity over an axis of size 1."""

    forward: Callable[[Tensor, Axis], Tensor]
    backward: Callable[[Tensor, Axis], Tensor]

    def __call__(self, x: Tensor, axis: Axis) -> Tensor:
        if axis.size == 1:
            return x
        return with_backward(x, partial(self.forward, axis=axis), partial(self.backward, axis=axis))


# Identity forward, all-reduce backward (Megatron's f): [T, ...] -> [T, ...].
copy = _Collective(forward=_identity, backward=_all_reduce)
# All-reduce forward, identity backward (Megatron's g): partial sums [T, ...] -> their sum [T, ...].
reduce = _Collective(forward=_all_reduce, backward=_identity)
# This rank's rows forward, all-gather backward: [T, ...], equal on all ranks -> [T / size, ...].
split = _Collective(forward=_slice, backward=_all_gather)
# All-gather forward, reduce-scatter backward: [T / size, ...] -> [T, ...], which each rank uses differently.
gather = _Collective(forward=_all_gather, backward=_reduce_scatter)
# Reduce-scatter forward, all-gather backward: partial sums [T, ...] -> [T / size, ...].
reduce_scatter = _Collective(forward=_reduce_scatter, backward=_all_gather)
# All-gather forward, this rank's rows backward: [T / size, ...] -> [T, ...], which every rank uses alike.
join = _Collective(forward=_all_gather, backward=_slice)


def enter_parallel(x: Tensor, tp: TensorAxis) -> Tensor:
    """[T, D] (replicated) or [T / tp, D] (sequence) -> [T, D], the input that column-parallel weights multiply."""
    return tp.call(gather, x, tp) if tp.sequence else copy(x, tp)


def leave_parallel(x: Tensor, tp: TensorAxis) -> Tensor:
    """Partial sums [T, D] of row-parallel weights -> [T, D] (replicated) or [T / tp, D] (sequence)."""
    return reduce_scatter(x, tp) if tp.sequence else reduce(x, tp)


@dataclass(frozen=True)
class AsyncResult:
    """The result of a collective that has started; its values are there after `wait`."""

    result: Tensor
    work: dist.Work

    def wait(self) -> Tensor:
        """The result. On a GPU the current stream waits, and the host does not."""
        self.work.wait()
        return self.result


def start_all_gather(x: Tensor, axis: Axis) -> AsyncResult:
    """Start the all-gather of the rows [T / size, ...] of each rank -> [T, ...]."""
    whole = x.new_empty((axis.size * x.shape[0], *x.shape[1:]))  # [T, ...]
    return AsyncResult(whole, all_gather_single(whole, x.contiguous(), group=axis.group, async_op=True))


def start_entry_gradient(grad: Tensor, tp: TensorAxis) -> AsyncResult:
    """Start the backward of `enter_parallel`: [T, D] -> [T, D] (replicated) or [T / tp, D] (sequence).

    Args:
        grad: contiguous; the all-reduce overwrites it
    """
    if not tp.sequence:
        return AsyncResult(grad, dist.all_reduce(grad, group=tp.group, async_op=True))
    part = grad.new_empty((grad.shape[0] // tp.size, *grad.shape[1:]))  # [T / tp, D]
    return AsyncResult(part, reduce_scatter_single(part, grad, group=tp.group, async_op=True))


def all_gather(x: Tensor, axis: Axis) -> Tensor:
    """Rows [T / size, ...] of each rank -> [T, ...], without a gradient, as for indices."""
    return x if axis.size == 1 else _all_gather(x, axis)


def split_tokens(x: Tensor, tp: TensorAxis) -> Tensor:
    """[T, D], equal on all ranks -> [T / tp, D] under sequence parallelism, unchanged without."""
    return split(x, tp) if tp.sequence else x


def shared_weight(weight: Tensor, tp: TensorAxis) -> Tensor:
    """A replicated weight that meets only this rank's tokens: under sequence parallelism its gradient is a partial sum,
    which the backward pass adds up over the ranks."""
    return copy(weight, tp) if tp.sequence else weight


def join_shares(x: Tensor, total: int, axis: Axis) -> Tensor:
    """All-gather of the shares of `total` rows, [share, ...] -> [total, ...]; every rank continues with all rows.

    The shares are those of `megavl.batch.tile_share`. Only the last ones are short, so padding keeps the rows in order.
    A rank with an empty share passes one row, which is cut off with the padding.
    """
    missing = -(-total // axis.size) - len(x)
    if missing:
        x = torch.cat((x, x.new_zeros(missing, *x.shape[1:])))  # [ceil(total / size), ...]
    return join(x, axis)[:total]


def summing_gradients(module: nn.Module, axis: Axis) -> Callable[..., Tensor]:
    """`module`, called with a part of the input that the ranks share: the gradients of its parameters, which are whole
    on every rank, are partial sums, which the backward pass adds up. Frozen ones cost nothing."""
    copies = {name: copy(weight, axis) for name, weight in module.named_parameters() if weight.requires_grad}
    return lambda *inputs: functional_call(module, copies, inputs)
