"""RMSNorm in Triton, alone and with the addition to the residual stream before it.

A row is one block in registers, so each tensor is read or written once. The statistics are in fp32, and the forward
pass rounds values where `megavl.ops.norm` rounds them. The backward pass gives each program consecutive rows, and the
program adds up their part of the weight's gradient in fp32; a second kernel adds the parts in a fixed order. There are
no atomic additions, so a run repeats its numbers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megavl.ops.kernels.layout import with_unit_stride
from megavl.ops.norm import Norms, add_rms_norm, rms_norm

# From here on the backward pass spills registers.
_MAX_WIDTH = 8192
_ELEMENTS_PER_WARP = 512
# Programs of the backward pass for each multiprocessor, enough to hide the latency of one row's loads.
_PROGRAMS_PER_SM = 4
# Tile of `sum_kernel`; its rows are 128 bytes.
SUM_ROWS, SUM_COLUMNS = 64, 32


@triton.jit
def forward_kernel(
    x,  # [T, D], rows `x_stride` apart
    delta,  # [T, D], rows `delta_stride` apart; not read unless ADD
    weight,  # [D]
    total,  # [T, D], x + delta; not written unless ADD
    normed,  # [T, D]
    rstd,  # float32 [T]
    x_stride,
    delta_stride,
    width,
    eps,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(x + row * x_stride + column, mask=inside, other=0.0)
    if ADD:
        value = value.to(tl.float32) + tl.load(delta + row * delta_stride + column, mask=inside, other=0.0).to(
            tl.float32
        )
        value = value.to(total.dtype.element_ty)
        tl.store(total + row * width + column, value, mask=inside)
    wide = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / width + eps)
    tl.store(rstd + row, scale)
    rounded = (wide * scale).to(value.dtype).to(tl.float32)
    by_weight = rounded * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + row * width + column, by_weight.to(normed.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "rows_per_program"])
def backward_kernel(
    x,  # [T, D], what was normalised, rows `x_stride` apart
    weight,  # [D]
    rstd,  # float32 [T]
    grad,  # [T, D], of the normalised values, rows `grad_stride` apart
    total_grad,  # [T, D], of x as the residual stream, rows `total_stride` apart; not read unless ADD
    x_grad,  # [T, D]
    parts,  # float32 [programs, D], of the weight's gradient; not written unless WEIGHT
    x_stride,
    grad_stride,
    total_stride,
    rows,
    rows_per_program,
    width,
    ADD: tl.constexpr,
    WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    by_weight = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    part = tl.zeros([BLOCK], tl.float32)
    first = program * rows_per_program
    for index in range(tl.minimum(rows_per_program, rows - first)):
        row = first + index
        value = tl.load(x + row * x_stride + column, mask=inside, other=0.0)
        upstream = tl.load(grad + row * grad_stride + column, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(rstd + row)
        unit = value.to(tl.float32) * scale
        if WEIGHT:
            part += upstream * unit.to(value.dtype).to(tl.float32)
        for_unit = upstream * by_weight
        for_x = scale * (for_unit - unit * (tl.sum(for_unit * unit, 0) / width))
        if ADD:
            for_x += tl.load(total_grad + row * total_stride + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(x_grad + row * width + column, for_x.to(x_grad.dtype.element_ty), mask=inside)
    if WEIGHT:
        tl.store(parts + program * width + column, part, mask=inside)


@triton.jit(do_not_specialize=["count"])
def sum_kernel(
    parts,  # float32 [N, D]
    total,  # [D]
    count,
    width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    summed = tl.zeros([COLUMNS], tl.float32)
    for first in range(0, count, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < count)[:, None] & (column < width)[None, :]
        summed += tl.sum(tl.load(parts + row[:, None] * width + column[None, :], mask=inside, other=0.0), 0)
    tl.store(total + column, summed.to(total.dtype.element_ty), mask=column < width)


def warps(block: int) -> int:
    """Warps of a program that holds a row of `block` elements."""
    return min(max(block // _ELEMENTS_PER_WARP, 1), 16)


def multiprocessors(device: torch.device) -> int:
    """Number of multiprocessors of a CUDA device; 1 for a CPU, which interprets the kernels."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _forward(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """What is normalised [T, D] (`x`, or its sum with `delta`), the normalised values [T, D], and rstd float32 [T]."""
    rows, width = x.shape
    x = with_unit_stride(x)
    add = delta is not None
    delta = with_unit_stride(delta) if add else x
    total = torch.empty(rows, width, dtype=torch.promote_types(x.dtype, delta.dtype), device=x.device) if add else x
    normed = torch.empty(rows, width, dtype=torch.promote_types(total.dtype, weight.dtype), device=x.device)
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows:
        block = triton.next_power_of_2(width)
        forward_kernel[(rows,)](
            *(x, delta, weight, total, normed, rstd, x.stride(0), delta.stride(0), width, eps),
            ADD=add,
            BLOCK=block,
            num_warps=warps(block),
        )
    return total, normed, rstd


def _backward(
    x: Tensor, weight: Tensor, rstd: Tensor, grad: Tensor, total_grad: Tensor | None, for_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of what was normalised, [T, D], and of the weight, [D], or None unless `for_weight`."""
    rows, width = x.shape
    x_grad = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    if not rows:
        return x_grad, torch.zeros_like(weight) if for_weight else None
    grad = with_unit_stride(grad)
    add = total_grad is not None
    total_grad = with_unit_stride(total_grad) if add else grad
    programs, block = min(rows, multiprocessors(x.device) * _PROGRAMS_PER_SM), triton.next_power_of_2(width)
    rows_per_program = triton.cdiv(rows, programs)
    parts = torch.empty(programs, width, dtype=torch.float32, device=x.device) if for_weight else rstd
    backward_kernel[(programs,)](
        *(x, weight, rstd, grad, total_grad, x_grad, parts),
        *(x.stride(0), grad.stride(0), total_grad.stride(0), rows, rows_per_program, width),
        ADD=add,
        WEIGHT=for_weight,
        BLOCK=block,
        num_warps=warps(block),
    )
    if not for_weight:
        return x_grad, None
    weight_grad = torch.empty_like(weight)
    sum_kernel[(triton.cdiv(width, SUM_COLUMNS),)](
        *(parts, weight_grad, programs, width), ROWS=SUM_ROWS, COLUMNS=SUM_COLUMNS
    )
    return x_grad, weight_grad


class _RmsNorm(Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x, normed, rstd = _forward(x, None, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight, rstd = ctx.saved_tensors
        return *_backward(x, weight, rstd, grad, None, ctx.needs_input_grad[1]), None


class _AddRmsNorm(Function):
    @staticmethod
    def forward(ctx, h: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total, normed, rstd = _forward(h, delta, weight, eps)
        ctx.save_for_backward(total, weight, rstd)
        # The sum may be unused, as in front of the head: its gradient is then None, and no zeros are read.
        ctx.set_materialize_grads(False)
        return total, normed

    @staticmethod
    @once_differentiable
    def backward(ctx, total_grad: Tensor | None, grad: Tensor | None):
        total, weight, rstd = ctx.saved_tensors
        if grad is None:
            return total_grad, total_grad, None, None
        for_sum, for_weight = _backward(total, weight, rstd, grad, total_grad, ctx.needs_input_grad[2])
        return for_sum, for_sum, for_weight, None


def fused_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`megavl.ops.norm.rms_norm` of rows up to 8192 wide; the reference for wider ones."""
    if x.shape[1] > _MAX_WIDTH:
        return rms_norm(x, weight, eps)
    return _RmsNorm.apply(x, weight, eps)


def fused_add_rms_norm(h: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`megavl.ops.norm.add_rms_norm` of rows up to 8192 wide; the reference for wider ones."""
    if h.shape[1] > _MAX_WIDTH:
        return add_rms_norm(h, delta, weight, eps)
    return _AddRmsNorm.apply(h, delta, weight, eps)


TRITON_NORMS = Norms(fused_rms_norm, fused_add_rms_norm)
