"""Alignment of operands to 16 bytes.

A kernel for matrices or attention reads 16 bytes with one instruction, provided that a tensor begins at a multiple of
16 bytes and that its rows do. From any other address it is slower (a GEMM by two to three times) or fails ("misaligned
address"). Allocations begin at multiples of 64 bytes or more, so only slices can be misaligned.
"""

import torch
from torch import Tensor
from torch.autograd import Function

ALIGNMENT_BYTES = 16


def is_aligned(x: Tensor) -> bool:
    """Whether `x` begins at a multiple of 16 bytes of its storage, and so does each of its rows."""
    size = x.element_size()
    steps = [stride for stride, length in zip(x.stride(), x.shape, strict=True) if length > 1 and stride != 1]
    return not any(elements * size % ALIGNMENT_BYTES for elements in (x.storage_offset(), *steps))


def aligned(x: Tensor) -> Tensor:
    """`x`, or a contiguous copy if it is misaligned.

    The copy begins at an aligned address. Its rows are aligned only if their width is a multiple of 16 bytes: kernels
    check the strides, but not the address.
    """
    if is_aligned(x) or x.is_contiguous() and x.storage_offset() * x.element_size() % ALIGNMENT_BYTES == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


class _AlignedGradient(Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return aligned(grad)


def with_aligned_gradient(x: Tensor) -> Tensor:
    """Identity; backward returns an aligned gradient."""
    return _AlignedGradient.apply(x)
