"""Cross entropy of the logits x W^T, the vocabulary cut over the tensor axis; the full row is never gathered.

Three numbers per token cross ranks: the maximum, the sum of exponentials, the logit of the label.
"""

import math
from typing import Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from megavl.parallel.groups import Axis

# Most bytes of logits in memory: 1,310 rows of a 102,400-word vocabulary in bf16. The gradient of W is rounded after
# each chunk of rows, so chunks are large.
_CHUNK_BYTES = 2**28


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


def _loss_of(
    logits: Tensor, labels: Tensor, ignore_index: int, axis: Axis, local: LocalCrossEntropy, gradient: bool
) -> Tensor:
    """Summed loss of some rows, float32 []; with `gradient` the logits are overwritten with their gradient."""
    vocab = logits.shape[1]
    supervised = labels != ignore_index
    columns = labels - axis.rank * vocab
    columns = columns.masked_fill(~(supervised & (columns >= 0) & (columns < vocab)), -1)  # [T]
    maximum, total, label_logit = local.statistics(logits, columns)
    if axis.size > 1:
        maximum, total, label_logit = _over_ranks(maximum, total, label_logit, axis)
    log_normaliser = maximum + total.log()  # [T]
    # d loss / d logit = softmax - one_hot, and 0 in a row without a label.
    if gradient:
        local.write_gradient(logits, columns, log_normaliser.masked_fill(~supervised, math.inf))
    return ((log_normaliser - label_logit) * supervised).sum()


class _SummedCrossEntropy(Function):
    """Computes the logits of one chunk of rows at a time, and the gradients in the forward pass: memory never holds the
    logits of all rows, and none after the forward pass."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight: Tensor,
        labels: Tensor,
        ignore_index: int,
        axis: Axis,
        local: LocalCrossEntropy,
        chunk_bytes: int,
    ) -> Tensor:
        of_x, of_weight = ctx.needs_input_grad[:2]
        loss = torch.zeros((), dtype=torch.float32, device=x.device)
        x_gradients, weight_gradient = [], None
        # Equal on all ranks of the axis, which have equal shares of the vocabulary.
        chunks = -(-len(x) * len(weight) * x.element_size() // chunk_bytes) or 1
        for rows, row_labels in zip(x.tensor_split(chunks), labels.tensor_split(chunks), strict=True):
            logits = F.linear(rows, weight)  # [rows, V / tp]
            loss += _loss_of(logits, row_labels, ignore_index, axis, local, of_x or of_weight)
            if of_x:
                x_gradients.append(torch.matmul(logits, weight))  # [rows, d]
            if of_weight and weight_gradient is None:
                weight_gradient = torch.matmul(logits.t(), rows)  # [V / tp, d]
            elif of_weight:
                weight_gradient.addmm_(logits.t(), rows)
            del logits  # before the next chunk's are made
        ctx.gradients = torch.cat(x_gradients) if of_x else None, weight_gradient
        return loss

    @staticmethod
    def backward(ctx, grad: Tensor):
        gradients = [None if gradient is None else gradient.mul_(grad) for gradient in ctx.gradients]
        # Autograd copies the gradient of a parameter that something else refers to.
        del ctx.gradients
        return *gradients, None, None, None, None, None


def summed_cross_entropy(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int,
    axis: Axis,
    local: LocalCrossEntropy,
    chunk_bytes: int = _CHUNK_BYTES,
) -> Tensor:
    """Sum over the supervised tokens of -log softmax(x W^T)[label], in nats.

    Args:
        x: [T, d], float or bfloat16; its gradient is the part that comes from this rank's columns
        weight: [V / tp, d], this rank's rows of W
        labels: int64 [T], ids of the full vocabulary
        ignore_index: label of a position where nothing is supervised
        axis: over which the vocabulary is cut
        local: implementation of what a rank computes from its own columns
        chunk_bytes: most bytes of logits in memory

    Returns:
        float32 [], equal on all ranks of the axis
    """
    if not torch.is_grad_enabled():
        x, weight = x.detach(), weight.detach()  # `needs_input_grad` disregards no_grad
    return _SummedCrossEntropy.apply(x, weight, labels, ignore_index, axis, local, chunk_bytes)
