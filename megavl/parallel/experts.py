"""The way of tokens to their experts and back, over the expert axis (DeepSeek-V2, arXiv 2405.04434, section 3.1.3).

A token has one row for each expert that it goes to. Rows are sorted by expert, and so by the rank that holds it; they
change ranks, are put together by expert, and come back by the same steps. No row is dropped. Every rank takes part in
every exchange, also with no rows: the others would wait for it.

| step    | forward                              | backward                            |
|---------|--------------------------------------|-------------------------------------|
| start   | rows of tokens; all-to-all begins    | all-to-all back ends; sum per token |
| finish  | all-to-all ends; rows by expert      | all-to-all back begins              |
| combine | all-to-all back; weighted sum        | all-to-all of weighted gradients    |

What is computed between start and finish runs while the rows are under way. So does its backward pass: autograd takes
the steps in the opposite order.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megavl.parallel.autograd import with_backward
from megavl.parallel.groups import Axis, ExpertAxis


@dataclass
class _Transfer:
    """Split sizes of one all-to-all, by rank.

    work, arriving: handle and receive buffer between `start` and `finish`
    """

    sent: list[int]
    received: list[int]
    axis: Axis
    work: dist.Work | None = None
    arriving: Tensor | None = None

    def dual(self) -> "_Transfer":
        """The way of the gradients."""
        return _Transfer(self.received, self.sent, self.axis)

    def start(self, x: Tensor) -> Tensor:
        """Begin to send the rows `x`. Returns the tensor that holds the received rows after `finish`."""
        self.arriving = x.new_empty(sum(self.received), *x.shape[1:])  # [rows received, ...]
        self.work = dist.all_to_all_single(
            self.arriving, x.contiguous(), self.received, self.sent, group=self.axis.group, async_op=True
        )
        return self.arriving

    def start_gradient(self, grad: Tensor) -> Tensor:
        """Begin to send `grad`. Returns `grad` itself: autograd requires a gradient of the shape of the input of
        `_finish_rows`, and the backward of `_start_rows` replaces it by the received one."""
        self.start(grad)
        return grad

    def finish(self, _x: Tensor) -> Tensor:
        """The rows that are received."""
        self.work.wait()
        arrived, self.work, self.arriving = self.arriving, None, None
        return arrived.view_as(arrived)


def _start_rows(x: Tensor, there: _Transfer, back: _Transfer) -> Tensor:
    return with_backward(x, forward=there.start, backward=back.finish)


def _finish_rows(x: Tensor, there: _Transfer, back: _Transfer) -> Tensor:
    return with_backward(x, forward=there.finish, backward=back.start_gradient)


class Permutation(Protocol):
    """Gathers, sums and the order of rows; `megavl.ops.permutation` defines them."""

    def spread(self, x: Tensor, tokens: Tensor, places: Tensor) -> Tensor: ...

    def combine(self, rows: Tensor, weights: Tensor, places: Tensor) -> Tensor: ...

    def permute(self, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor: ...

    def sort_by_expert(self, experts: Tensor, total: int) -> tuple[Tensor, Tensor, Tensor]: ...


class Dispatch:
    """The way of one micro-batch's tokens through one layer of experts. Collective over `ep` from its creation on.

    Args:
        experts: int64 [T, k], the experts of each token, all different
        total: experts of the layer, `total / ep.size` neighbours on each rank
        permutation: implementation of the gathers and sums of rows

    Attributes:
        counts: int64 [total / ep.size], rows of each expert of this rank, on the device of `experts`
    """

    def __init__(self, experts: Tensor, total: int, ep: ExpertAxis, permutation: Permutation):
        self._ep, self._permutation = ep, permutation
        order, places, self.counts = permutation.sort_by_expert(experts.flatten(), total)  # of [T * k]
        self._tokens = order // experts.shape[1]  # [T * k], the token that a row is of
        self._places = places.view_as(experts)  # [T, k], the row that a choice has
        if ep.size > 1:
            self._exchange_counts()

    def _exchange_counts(self) -> None:
        """Exchange the row counts; derive the split sizes of the transfer and the permutation by expert."""
        sent = self.counts.view(self._ep.size, -1)  # [ep, total / ep]
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self._ep.group)
        # The only device-to-host sync of a layer: all_to_all_single needs its split sizes on the host.
        sizes = torch.stack((sent.sum(1), received.sum(1)))  # [2, ep]
        to_ranks, from_ranks = self._ep.read_sizes(sizes, len(self._tokens))
        self._there = _Transfer(to_ranks, from_ranks, self._ep)
        self._there_dual = self._there.dual()
        if not sum(from_ranks):
            self.counts = received.sum(0)  # [total / ep], zeros
            return  # nothing to permute, and kernels may refuse empty tensors
        expert = torch.arange(received.shape[1], device=received.device).repeat(self._ep.size)  # [total]
        rows = expert.repeat_interleave(received.flatten(), output_size=sum(from_ranks))  # [N]
        self._by_expert, self._by_rank, self.counts = self._permutation.sort_by_expert(rows, received.shape[1])

    def start(self, x: Tensor) -> Tensor:
        """Start the all-to-all of the tokens [T, D]. Pass the result to `finish` unchanged."""
        rows = self._permutation.spread(x, self._tokens, self._places)  # [T * k, D]
        return rows if self._ep.size == 1 else _start_rows(rows, self._there, self._there_dual)

    def finish(self, under_way: Tensor) -> Tensor:
        """Rows of this rank's experts, sorted by expert: [counts.sum(), D]."""
        if self._ep.size == 1:
            return under_way
        rows = _finish_rows(under_way, self._there, self._there_dual)  # [N, D]
        return self._permutation.permute(rows, self._by_expert, self._by_rank) if len(rows) else rows

    def combine(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Return the experts' rows to their tokens and sum them.

        Args:
            rows: [counts.sum(), D], in the order of `finish`
            weights: float32 [T, k], of each token's experts

        Returns:
            [T, D] in the dtype of the rows
        """
        if self._ep.size > 1:
            rows = self._permutation.permute(rows, self._by_rank, self._by_expert) if len(rows) else rows
            back = self._there.dual()
            dual = back.dual()
            rows = _finish_rows(_start_rows(rows, back, dual), back, dual)  # [T * k, D]
        return self._permutation.combine(rows, weights, self._places)
