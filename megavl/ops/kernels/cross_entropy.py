"""The two local parts of the cross entropy in Triton. Each reads the logits once.

The statistics use the maximum and the sum of exponentials so far, as in online softmax (arXiv 1805.02867).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megavl.ops.cross_entropy import CrossEntropy, RowStatistics, row_statistics, write_gradient

STATISTICS_BLOCK = 8192
STATISTICS_WARPS = 8
GRADIENT_BLOCK = 4096
GRADIENT_WARPS = 8


@triton.jit
def statistics_kernel(
    logits,  # [T, V], rows `stride` apart
    columns,  # int64 [T]
    maximum,  # float32 [T]
    total,  # float32 [T]
    label_logit,  # float32 [T]
    stride,
    vocab,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    # The first block gives a finite maximum: -inf - -inf would be NaN.
    offset = tl.arange(0, BLOCK)
    value = tl.load(logits + offset, mask=offset < vocab, other=float("-inf")).to(tl.float32)
    largest = tl.max(value, 0)
    summed = tl.sum(tl.exp(value - largest), 0)
    for start in range(BLOCK, vocab, BLOCK):
        column = start + offset
        value = tl.load(logits + column, mask=column < vocab, other=float("-inf")).to(tl.float32)
        before = largest
        largest = tl.maximum(before, tl.max(value, 0))
        summed = summed * tl.exp(before - largest) + tl.sum(tl.exp(value - largest), 0)
    tl.store(maximum + row, largest)
    tl.store(total + row, summed)
    label = tl.load(columns + row)
    tl.store(label_logit + row, tl.load(logits + label, mask=label >= 0, other=0.0).to(tl.float32))


@triton.jit(do_not_specialize=["blocks"])
def gradient_kernel(
    logits,  # [T, V], rows `stride` apart; overwritten
    columns,  # int64 [T]
    log_normaliser,  # float32 [T]
    stride,
    vocab,
    blocks,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    column = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = column < vocab
    place = logits + row * stride + column
    value = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    probability = tl.exp(value - tl.load(log_normaliser + row))
    gradient = tl.where(column == tl.load(columns + row), probability - 1.0, probability)
    tl.store(place, gradient.to(logits.dtype.element_ty), mask=inside)


def fused_row_statistics(logits: Tensor, columns: Tensor) -> RowStatistics:
    """See `CrossEntropy`."""
    rows, vocab = logits.shape
    if logits.stride(1) != 1:
        return row_statistics(logits, columns)
    statistics = RowStatistics(*torch.empty(3, rows, dtype=torch.float32, device=logits.device).unbind())  # [T] each
    if rows:
        statistics_kernel[(rows,)](
            *(logits, columns.contiguous(), *statistics, logits.stride(0), vocab),
            BLOCK=STATISTICS_BLOCK,
            num_warps=STATISTICS_WARPS,
        )
    return statistics


def fused_write_gradient(logits: Tensor, columns: Tensor, log_normaliser: Tensor) -> None:
    """See `CrossEntropy`. Columns that are not side by side are overwritten by the reference: a copy would not be."""
    rows, vocab = logits.shape
    if logits.stride(1) != 1:
        write_gradient(logits, columns, log_normaliser)
    elif rows:
        blocks = triton.cdiv(vocab, GRADIENT_BLOCK)
        gradient_kernel[(rows * blocks,)](
            *(logits, columns.contiguous(), log_normaliser.contiguous(), logits.stride(0), vocab, blocks),
            BLOCK=GRADIENT_BLOCK,
            num_warps=GRADIENT_WARPS,
        )


TRITON_CROSS_ENTROPY = CrossEntropy(fused_row_statistics, fused_write_gradient)
