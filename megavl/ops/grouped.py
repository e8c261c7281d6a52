"""Products of rows with the matrix of the expert that each belongs to, of all experts at once.

Every implementation has one signature, `GroupedLinear`:
    x:      [N, d_in], sorted by expert; N is at least 1
    weight: [E, d_out, d_in]
    groups: how many rows each expert has, N in all
    returns [N, d_out]; the gradient of an expert without rows is zeros
"""

from collections.abc import Callable
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from megavl.ops.small_products import faster_in_fp32


class Groups:
    """How many rows each expert has, in the form that an implementation reads, found once for all products of a layer.

    counts: int64 [E] on any device; any may be 0
    """

    def __init__(self, counts: Tensor):
        self._counts = counts

    @cached_property
    def sizes(self) -> list[int]:
        """On the processor: of counts that lie on a GPU it has to wait for them."""
        return self._counts.tolist()

    @cached_property
    def ends(self) -> Tensor:
        """int32 [E], where the rows of each expert end, on the device of the counts."""
        return self._counts.cumsum(0, dtype=torch.int32)


GroupedLinear = Callable[[Tensor, Tensor, Groups], Tensor]

# x [N, d_in], weight [E, d_out, d_in], rows of each expert int64 [E] on the processor, whether to transpose the weight.
GroupedGemm = Callable[[Tensor, Tensor, Tensor, bool], Tensor]

# Strides of bf16 matrices are read in units of 16 bytes.
_WIDTH_MULTIPLE = 8


def _served(x: Tensor, weight: Tensor) -> bool:
    """Whether the bf16 kernels accept these operands."""
    d_out, d_in = weight.shape[1:]
    return x.dtype == torch.bfloat16 and not (d_out % _WIDTH_MULTIPLE or d_in % _WIDTH_MULTIPLE)


def reference_grouped_linear(x: Tensor, weight: Tensor, groups: Groups) -> Tensor:
    """One product per expert that has rows: exact, any device and dtype."""
    if not faster_in_fp32(x, weight[0].numel()):
        return _PerExpert.apply(x, weight, groups.sizes)
    return _PerExpert.apply(x.float(), weight.float(), groups.sizes).to(x.dtype)


class _PerExpert(Function):
    """Each product writes into its place of the result or of the gradient: autograd would compute the gradient of each
    expert by itself and stack them."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, sizes: list[int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.sizes = sizes
        y = x.new_empty(len(x), weight.shape[1])  # [N, d_out]
        for rows, matrix, out in zip(x.split(sizes), weight, y.split(sizes), strict=True):
            if len(rows):
                torch.mm(rows, matrix.t(), out=out)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        grads, for_x, for_weight = grad.split(ctx.sizes), None, None
        if ctx.needs_input_grad[0]:
            for_x = torch.empty_like(x)  # [N, d_in]
            for rows, matrix, out in zip(grads, weight, for_x.split(ctx.sizes), strict=True):
                if len(rows):
                    torch.mm(rows, matrix, out=out)
        if ctx.needs_input_grad[1]:  # experts may be frozen
            for_weight = torch.empty_like(weight)  # [E, d_out, d_in]
            for rows, inputs, out in zip(grads, x.split(ctx.sizes), for_weight, strict=True):
                if len(rows):
                    torch.mm(rows.t(), inputs, out=out)
                else:
                    out.zero_()
        return for_x, for_weight, None


class _GroupedMm(Function):
    """torch's kernel, which reads the counts on the device. Its own derivative would refuse gradients whose strides are
    not in units of 16 bytes, as those of a sum are."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, ends: Tensor, clears_empty: bool) -> Tensor:
        ctx.save_for_backward(x, weight, ends)
        ctx.clears_empty = clears_empty
        return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)  # [N, d_out]

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, ends = ctx.saved_tensors
        grad = grad.contiguous()
        for_x = for_weight = None
        if ctx.needs_input_grad[0]:
            for_x = F.grouped_mm(grad, weight, offs=ends)  # [N, d_in]
        if ctx.needs_input_grad[1]:  # experts may be frozen
            for_weight = F.grouped_mm(grad.t(), x, offs=ends)  # [E, d_out, d_in]
            if ctx.clears_empty:
                empty = ends.diff(prepend=ends.new_zeros(1)) == 0  # [E]
                for_weight.masked_fill_(empty[:, None, None], 0.0)
        return for_x, for_weight, None, None


def grouped_mm_linear(clears_empty: bool) -> GroupedLinear:
    """torch's grouped_mm for bf16 and widths in units of 16 bytes, the reference for all others.

    clears_empty: the kernel of this device leaves arbitrary values in the gradient of an expert without rows
    """

    def grouped_linear(x: Tensor, weight: Tensor, groups: Groups) -> Tensor:
        if not _served(x, weight):
            return reference_grouped_linear(x, weight, groups)
        return _GroupedMm.apply(x.contiguous(), weight, groups.ends, clears_empty)

    return grouped_linear


def grouped_gemm_linear(gmm: GroupedGemm) -> GroupedLinear:
    """`grouped_gemm.ops.gmm` (github.com/tgale96/grouped_gemm), which has its own derivative, for what torch's kernel
    serves on newer devices; the reference for all others."""

    def grouped_linear(x: Tensor, weight: Tensor, groups: Groups) -> Tensor:
        if not _served(x, weight):
            return reference_grouped_linear(x, weight, groups)
        return gmm(x.contiguous(), weight, torch.tensor(groups.sizes), True)

    return grouped_linear
