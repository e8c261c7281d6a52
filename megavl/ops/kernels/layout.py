"""Layouts that the kernels serve: any row stride, channels side by side.

A slice of a fused projection has rows that are further apart than they are wide; kernels take that stride. Offsets of
rows are int64: T * V exceeds int32 from 21 thousand rows of 102,400 columns on.
"""

from torch import Tensor


def with_unit_stride(x: Tensor) -> Tensor:
    """`x`, or a contiguous copy if its last dimension has a stride other than 1, as gradients of a sum have."""
    return x if x.stride(-1) == 1 else x.contiguous()
