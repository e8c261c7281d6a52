"""Cross entropy over logits whose vocabulary is cut over the tensor axis; the full row is never gathered.

Three numbers per token cross ranks: the maximum, the sum of exponentials, the logit of the label.
"""

import math
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from megavl.parallel.groups import Axis


class LocalCrossEntropy(Protocol):
    """What a rank computes from its own columns; `megavl.ops.cross_entropy` defines it."""

    def statistics(self, logits: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]: ...

    def write_gradient(self, logits: Tensor, columns: Tensor, log_normaliser: Tensor) -> None: ...


def _over_ranks(maximum: Tensor, total: Tensor, label_logit: Tensor, axis: Axis) -> tuple[Tensor, Tensor, Tensor]:
    """The statistics of rows of the whole vocabulary, float32 [T] each."""
    local = maximum
    maximum = local.clone()
    dist.all_reduce(maximum, dist.ReduceOp.MAX, group=axis.group)
    sums = torch.stack((total * (local - maximum).exp(), label_logit))  # [2, T]
    dist.all_reduce(sums, group=axis.group)
    total, label_logit = sums
    return maximum, total, label_logit


class _SummedCrossEntropy(Function):
    @staticmethod
    def forward(ctx, logits: Tensor, labels: Tensor, ignore_index: int, axis: Axis, local: LocalCrossEntropy) -> Tensor:
        vocab = logits.shape[1]
        supervised = labels != ignore_index
        columns = labels - axis.rank * vocab
        columns = columns.masked_fill(~(supervised & (columns >= 0) & (columns < vocab)), -1)  # [T]
        maximum, total, label_logit = local.statistics(logits, columns)
        if axis.size > 1:
            maximum, total, label_logit = _over_ranks(maximum, total, label_logit, axis)
        log_normaliser = maximum + total.log()  # [T]
        # d loss / d logit = softmax - one_hot, and 0 in a row without a label.
        if ctx.needs_input_grad[0]:
            local.write_gradient(logits, columns, log_normaliser.masked_fill(~supervised, math.inf))
            ctx.gradient = logits
        return ((log_normaliser - label_logit) * supervised).sum()

    @staticmethod
    def backward(ctx, grad: Tensor):
        return ctx.gradient.mul_(grad), None, None, None, None


def summed_cross_entropy(
    logits: Tensor, labels: Tensor, ignore_index: int, axis: Axis, local: LocalCrossEntropy
) -> Tensor:
    """Sum over the supervised tokens of -log softmax(logits)[label], in nats.

    Args:
        logits: [T, V / tp], this rank's columns, float or bfloat16; overwritten if they need a gradient
        labels: int64 [T], ids of the full vocabulary
        ignore_index: label of a position where nothing is supervised
        axis: over which the vocabulary is cut
        local: implementation of what a rank computes from its own columns

    Returns:
        float32 [], equal on all ranks of the axis
    """
    return _SummedCrossEntropy.apply(logits, labels, ignore_index, axis, local)
