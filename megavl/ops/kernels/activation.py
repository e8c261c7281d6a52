"""SwiGLU in Triton. The backward pass computes silu(gate) again, so nothing but gate and up is kept."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megavl.ops.kernels.layout import with_unit_stride

BLOCK = 1024


# An expert's rows are another number in every step, which must not compile a kernel again.
@triton.jit(do_not_specialize=["blocks"])
def forward_kernel(
    gate,  # [T, D], rows `gate_stride` apart
    up,  # [T, D], rows `up_stride` apart
    out,  # [T, D]
    gate_stride,
    up_stride,
    width,
    blocks,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    column = (program % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    by_gate = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0)
    by_up = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    wide = by_gate.to(tl.float32)
    silu = (wide * tl.sigmoid(wide)).to(by_gate.dtype).to(tl.float32)
    tl.store(out + row * width + column, (silu * by_up).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["blocks"])
def backward_kernel(
    gate,  # [T, D], rows `gate_stride` apart
    up,  # [T, D], rows `up_stride` apart
    grad,  # [T, D], rows `grad_stride` apart
    gate_grad,  # [T, D], rows `out_stride` apart
    up_grad,  # [T, D], rows `out_stride` apart
    gate_stride,
    up_stride,
    grad_stride,
    out_stride,
    width,
    blocks,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    column = (program % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    by_gate = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0)
    by_up = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    upstream = tl.load(grad + row * grad_stride + column, mask=inside, other=0.0).to(tl.float32)
    wide = by_gate.to(tl.float32)
    sigmoid = tl.sigmoid(wide)
    silu = wide * sigmoid
    for_gate = upstream * by_up * (sigmoid + silu * (1.0 - sigmoid))
    for_up = upstream * silu.to(by_gate.dtype).to(tl.float32)
    tl.store(gate_grad + row * out_stride + column, for_gate.to(gate_grad.dtype.element_ty), mask=inside)
    tl.store(up_grad + row * out_stride + column, for_up.to(up_grad.dtype.element_ty), mask=inside)


def _as_rows(*tensors: Tensor) -> tuple[int, int, list[int]]:
    """Rows, width and the stride between the rows of each tensor. Contiguous tensors are one long row, whose last block
    alone can be incomplete."""
    rows, width = tensors[0].shape
    if all(x.is_contiguous() for x in tensors):
        return 1, rows * width, [0] * len(tensors)
    return rows, width, [x.stride(0) for x in tensors]


def _gradients_of(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Uninitialised gradients [T, D] of gate and up: halves of one tensor where these are, so that the product which
    computed both takes their gradients as one matrix; else contiguous."""
    rows, width = gate.shape
    if gate.stride(0) == up.stride(0) == 2 * width:
        both = torch.empty(rows, 2 * width, dtype=gate.dtype, device=gate.device)  # [T, 2 D]
        return both[:, :width], both[:, width:]
    gate_grad = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)  # [T, D]
    return gate_grad, torch.empty(up.shape, dtype=up.dtype, device=up.device)  # [T, D]


class _SwiGlu(Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = with_unit_stride(gate), with_unit_stride(up)
        ctx.save_for_backward(gate, up)
        out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)  # [T, D]
        if out.numel():
            rows, width, strides = _as_rows(gate, up)
            blocks = triton.cdiv(width, BLOCK)
            forward_kernel[(rows * blocks,)](gate, up, out, *strides, width, blocks, BLOCK=BLOCK, num_warps=4)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        gate, up = ctx.saved_tensors
        grad = with_unit_stride(grad)
        gate_grad, up_grad = _gradients_of(gate, up)
        if grad.numel():
            rows, width, strides = _as_rows(gate, up, grad, gate_grad)
            blocks = triton.cdiv(width, BLOCK)
            backward_kernel[(rows * blocks,)](
                *(gate, up, grad, gate_grad, up_grad, *strides, width, blocks), BLOCK=BLOCK, num_warps=4
            )
        return gate_grad, up_grad


def fused_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`megavl.ops.activation.swiglu` of two matrices [T, D] of one dtype."""
    return _SwiGlu.apply(gate, up)
