"""Triton kernels for `megavl.ops.grouped` and `megavl.ops.expert_mlp`, in bf16 with fp32 sums.

Where each expert's rows end is read on the device, so the host does not wait for it: grids have room for the largest
possible number of tiles, and programs past the last tile return at once. The order of each sum is fixed.

Tile shapes are fixed, not tuned at run time, so that runs and ranks agree bit for bit. They are chosen for Ampere:
- A result of 128 x 128 at 4 warps is 64 x 64 per warp and 128 registers per thread. Smaller shares per warp need more
  reads of shared memory than tensor cores can wait for.
- A depth of 32 in 4 stages takes 48 KiB of shared memory and at most 255 registers, so two programs share an A100's
  multiprocessor. GPUs with 100 KiB (compute capability 8.6, 8.9) hold one or two as well.
- The kernels with SwiGLU have 128 x 64 results: two products at once, or an epilogue with more values per result.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function

from megavl.ops.activation import swiglu
from megavl.ops.expert_mlp import ComposedExpertMlp
from megavl.ops.grouped import Groups, reference_grouped_linear

_ROWS = 128
_COLUMNS = 128
_SWIGLU_COLUMNS = 64
_DEPTH = 32
_PIPELINE = {"num_warps": 4, "num_stages": 4}


@triton.jit
def find_tile(ends, tile, experts, ROWS: tl.constexpr, EXPERTS: tl.constexpr):
    """Each expert has its own tiles of `ROWS` rows.

    Returns:
        The expert of a tile (`EXPERTS` past the last tile), the tile's first row, and where the expert's rows end.
    """
    expert = tl.arange(0, EXPERTS)
    inside = expert < experts
    end = tl.load(ends + expert, mask=inside, other=0)
    begin = tl.load(ends + expert - 1, mask=inside & (expert > 0), other=0)
    tiles = tl.cdiv(end - begin, ROWS)
    last = tl.cumsum(tiles, 0)  # [EXPERTS], where the tiles of each expert end
    found = tl.sum((last <= tile).to(tl.int32), 0)
    first_row = tl.sum(tl.where(expert == found, begin + (tile - last + tiles) * ROWS, 0), 0)
    end_row = tl.sum(tl.where(expert == found, end, 0), 0)
    return found, first_row, end_row


@triton.jit
def load_block(pointers, mask, start, depth, BLOCK: tl.constexpr, AXIS: tl.constexpr, EVEN: tl.constexpr):
    """A block of an operand: zeros where `mask`, which spans the other axis, is false or the depth is exceeded."""
    if not EVEN:
        mask = mask & tl.expand_dims(start + tl.arange(0, BLOCK) < depth, 1 - AXIS)
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def add_product(
    total,
    x,
    weight,
    row_inside,
    column,
    columns,
    depth,
    column_stride,
    depth_stride,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """total + the product of a tile of rows with columns of one expert's weight.

    Offsets within a tile of rows or one expert's weight fit int32. In 64 bits they would take too many registers.
    """
    k = tl.arange(0, DEPTH)
    x_offset = tl.arange(0, ROWS)[:, None] * depth + k[None, :]
    weight_offset = column[None, :] * column_stride + k[:, None] * depth_stride
    column_inside = (column < columns)[None, :]
    for start in range(0, depth, DEPTH):
        left = load_block(x + x_offset, row_inside, start, depth, DEPTH, 1, EVEN)
        right = load_block(weight + weight_offset, column_inside, start, depth, DEPTH, 0, EVEN)
        total = tl.dot(left, right, total)
        x += DEPTH
        weight += DEPTH * depth_stride
    return total


@triton.jit(do_not_specialize=["rows"])  # it differs from step to step
def product_kernel(
    x,
    weight,
    second_weight,
    y,
    ends,
    rows,
    columns,
    depth,
    experts,
    column_stride,
    depth_stride,
    PAIR: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """y[n, c] = sum over d of x[n, d] * weight[expert of n, c, d], the strides of c and d as given.

    PAIR: x is [2, rows, depth], and the product of its second half with `second_weight` is added.
    EVEN: depth is divisible by DEPTH.
    """
    program = tl.program_id(0)
    column_tiles = tl.cdiv(columns, COLUMNS)
    expert, first_row, end_row = find_tile(ends, program // column_tiles, experts, ROWS, EXPERTS)
    if expert >= experts:
        return
    column = program % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
    row_inside = (tl.arange(0, ROWS) < end_row - first_row)[:, None]
    first_row = first_row.to(tl.int64)  # N * D may exceed int32, and so may E * D * F
    matrix = expert.to(tl.int64) * columns * depth
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    total = add_product(
        total,
        x + first_row * depth,
        weight + matrix,
        row_inside,
        column,
        columns,
        depth,
        column_stride,
        depth_stride,
        EVEN,
        ROWS,
        DEPTH,
    )
    if PAIR:
        total = add_product(
            total,
            x + (first_row + rows) * depth,
            second_weight + matrix,
            row_inside,
            column,
            columns,
            depth,
            column_stride,
            depth_stride,
            EVEN,
            ROWS,
            DEPTH,
        )
    offset = tl.arange(0, ROWS)[:, None] * columns + column[None, :]
    inside = row_inside & (column < columns)[None, :]
    tl.store(y + first_row * columns + offset, total.to(tl.bfloat16), mask=inside)


@triton.jit(do_not_specialize=["rows"])  # it differs from step to step
def weight_gradient_kernel(
    grad,
    x,
    for_weight,
    ends,
    rows,
    d_out,
    d_in,
    experts,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """for_weight[m, e, o, i] = sum over the rows n of expert e of grad[m, n, o] * x[n, i]; without rows, zeros."""
    expert, matrix = tl.program_id(1), tl.program_id(2).to(tl.int64)
    in_tiles = tl.cdiv(d_in, IN)
    begin = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends + expert)
    out_column = tl.program_id(0) // in_tiles * OUT + tl.arange(0, OUT)
    in_column = tl.program_id(0) % in_tiles * IN + tl.arange(0, IN)
    out_inside, in_inside = (out_column < d_out)[:, None], (in_column < d_in)[None, :]
    row = tl.arange(0, DEPTH)
    grad += (matrix * rows + begin) * d_out
    x += begin.to(tl.int64) * d_in
    grad_offset = row[None, :] * d_out + out_column[:, None]
    x_offset = row[:, None] * d_in + in_column[None, :]
    total = tl.zeros((OUT, IN), tl.float32)
    for start in range(begin, end, DEPTH):
        row_inside = row < end - start
        left = tl.load(grad + grad_offset, mask=out_inside & row_inside[None, :], other=0.0)
        right = tl.load(x + x_offset, mask=in_inside & row_inside[:, None], other=0.0)
        total = tl.dot(left, right, total)
        grad += DEPTH * d_out
        x += DEPTH * d_in
    for_weight += (matrix * experts + expert) * d_out * d_in
    offset = out_column[:, None] * d_in + in_column[None, :]
    tl.store(for_weight + offset, total.to(tl.bfloat16), mask=out_inside & in_inside)


@triton.jit(do_not_specialize=["rows"])  # it differs from step to step
def gate_up_kernel(
    x,
    gate_weight,
    up_weight,
    gate_up,
    hidden,
    ends,
    rows,
    columns,
    depth,
    experts,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """gate_up[0] and gate_up[1] = x times both weights; hidden = silu(gate_up[0]) * gate_up[1]."""
    program = tl.program_id(0)
    column_tiles = tl.cdiv(columns, COLUMNS)
    expert, first_row, end_row = find_tile(ends, program // column_tiles, experts, ROWS, EXPERTS)
    if expert >= experts:
        return
    column = program % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
    row_inside = (tl.arange(0, ROWS) < end_row - first_row)[:, None]
    column_inside = (column < columns)[None, :]
    first_row = first_row.to(tl.int64)  # N * D may exceed int32, and so may E * D * F
    x += first_row * depth
    matrix = expert.to(tl.int64) * columns * depth
    gate_weight += matrix
    up_weight += matrix
    k = tl.arange(0, DEPTH)
    x_offset = tl.arange(0, ROWS)[:, None] * depth + k[None, :]
    weight_offset = column[None, :] * depth + k[:, None]
    gate = tl.zeros((ROWS, COLUMNS), tl.float32)
    up = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, depth, DEPTH):
        left = load_block(x + x_offset, row_inside, start, depth, DEPTH, 1, EVEN)
        gate = tl.dot(left, load_block(gate_weight + weight_offset, column_inside, start, depth, DEPTH, 0, EVEN), gate)
        up = tl.dot(left, load_block(up_weight + weight_offset, column_inside, start, depth, DEPTH, 0, EVEN), up)
        x += DEPTH
        gate_weight += DEPTH
        up_weight += DEPTH
    offset, inside = tl.arange(0, ROWS)[:, None] * columns + column[None, :], row_inside & column_inside
    # From the rounded values, which the backward pass has too: its hidden activations are the same bit for bit.
    gate, up = gate.to(tl.bfloat16), up.to(tl.bfloat16)
    tl.store(gate_up + first_row * columns + offset, gate, mask=inside)
    tl.store(gate_up + (first_row + rows) * columns + offset, up, mask=inside)
    gate, up = gate.to(tl.float32), up.to(tl.float32)
    tl.store(hidden + first_row * columns + offset, (gate * tl.sigmoid(gate) * up).to(tl.bfloat16), mask=inside)


@triton.jit(do_not_specialize=["rows"])  # it differs from step to step
def hidden_gradient_kernel(
    grad,
    down_weight,
    gate_up,
    for_gate_up,
    hidden,
    ends,
    rows,
    columns,
    depth,
    experts,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """The gradients of gate and up from that of the output, and the hidden activations once more."""
    program = tl.program_id(0)
    column_tiles = tl.cdiv(columns, COLUMNS)
    expert, first_row, end_row = find_tile(ends, program // column_tiles, experts, ROWS, EXPERTS)
    if expert >= experts:
        return
    column = program % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
    row_inside = (tl.arange(0, ROWS) < end_row - first_row)[:, None]
    first_row = first_row.to(tl.int64)  # N * D may exceed int32, and so may E * D * F
    down_weight += expert.to(tl.int64) * columns * depth
    for_hidden = tl.zeros((ROWS, COLUMNS), tl.float32)
    for_hidden = add_product(
        for_hidden,
        grad + first_row * depth,
        down_weight,
        row_inside,
        column,
        columns,
        depth,
        1,
        columns,
        EVEN,
        ROWS,
        DEPTH,
    )
    of_gate, of_up = first_row * columns, (first_row + rows) * columns
    # The columns in two halves: the whole epilogue at once spills registers.
    halves = for_hidden.to(tl.bfloat16).reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1).split()
    for half in tl.static_range(2):
        column = program % column_tiles * COLUMNS + half * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)
        offset = tl.arange(0, ROWS)[:, None] * columns + column[None, :]
        inside = row_inside & (column < columns)[None, :]
        gate = tl.load(gate_up + of_gate + offset, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gate_up + of_up + offset, mask=inside, other=0.0).to(tl.float32)
        part = halves[half].to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        tl.store(hidden + of_gate + offset, (silu * up).to(tl.bfloat16), mask=inside)
        tl.store(for_gate_up + of_up + offset, (part * silu).to(tl.bfloat16), mask=inside)
        slope = sigmoid + silu * (1 - sigmoid)
        tl.store(for_gate_up + of_gate + offset, (part * up * slope).to(tl.bfloat16), mask=inside)


def _experts(experts: int) -> int:
    return triton.next_power_of_2(max(experts, 16))


def _grid(rows: int, columns: int, experts: int, block_columns: int) -> tuple[int]:
    """Room for the tiles of any counts: each expert may have one that is not full."""
    row_tiles = min(triton.cdiv(rows, _ROWS) + experts, rows)
    return (row_tiles * triton.cdiv(columns, block_columns),)


def _product(x: Tensor, weights: tuple[Tensor, ...], ends: Tensor, transposed: bool) -> Tensor:
    """x [N, d] times one weight or, summed, x [2, N, d] times two. Contracts dimension 2 of the weights [E, a, b], or
    dimension 1 if `transposed`."""
    experts, a, b = weights[0].shape
    columns, depth, column_stride, depth_stride = (b, a, 1, b) if transposed else (a, b, b, 1)
    rows = x.shape[-2]
    y = x.new_empty(rows, columns)
    product_kernel[_grid(rows, columns, experts, _COLUMNS)](
        x,
        weights[0],
        weights[-1],
        y,
        ends,
        rows,
        columns,
        depth,
        experts,
        column_stride,
        depth_stride,
        PAIR=len(weights) == 2,
        EVEN=depth % _DEPTH == 0,
        ROWS=_ROWS,
        COLUMNS=_COLUMNS,
        DEPTH=_DEPTH,
        EXPERTS=_experts(experts),
        **_PIPELINE,
    )
    return y


def _weight_gradient(grad: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """grad [matrices, N, d_out] and x [N, d_in] -> [matrices, E, d_out, d_in]"""
    matrices, rows, d_out = grad.shape
    d_in, experts = x.shape[1], len(ends)
    result = x.new_empty(matrices, experts, d_out, d_in)
    tiles = triton.cdiv(d_out, _COLUMNS) * triton.cdiv(d_in, _COLUMNS)
    weight_gradient_kernel[(tiles, experts, matrices)](
        grad, x, result, ends, rows, d_out, d_in, experts, OUT=_COLUMNS, IN=_COLUMNS, DEPTH=_DEPTH, **_PIPELINE
    )
    return result


class _GroupedLinear(Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, ends)
        return _product(x, (weight,), ends, transposed=False)  # [N, d_out]

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, ends = ctx.saved_tensors
        grad = grad.contiguous()
        for_x = for_weight = None
        if ctx.needs_input_grad[0]:
            for_x = _product(grad, (weight,), ends, transposed=True)  # [N, d_in]
        if ctx.needs_input_grad[1]:  # experts may be frozen
            for_weight = _weight_gradient(grad[None], x, ends)[0]  # [E, d_out, d_in]
        return for_x, for_weight, None


def grouped_linear(x: Tensor, weight: Tensor, groups: Groups) -> Tensor:
    """A `GroupedLinear` for bf16, of any widths; the reference for other dtypes."""
    if x.dtype != torch.bfloat16:
        return reference_grouped_linear(x, weight, groups)
    return _GroupedLinear.apply(x.contiguous(), weight.contiguous(), groups.ends)


class _ExpertMlp(Function):
    """Two launches forward and four backward. Keeps gate and up, from which backward has the hidden activations."""

    @staticmethod
    def forward(ctx, x: Tensor, gate: Tensor, up: Tensor, down: Tensor, ends: Tensor) -> Tensor:
        (rows, depth), (experts, columns, _) = x.shape, gate.shape
        gate_up, hidden = x.new_empty(2, rows, columns), x.new_empty(rows, columns)
        gate_up_kernel[_grid(rows, columns, experts, _SWIGLU_COLUMNS)](
            x,
            gate,
            up,
            gate_up,
            hidden,
            ends,
            rows,
            columns,
            depth,
            experts,
            EVEN=depth % _DEPTH == 0,
            ROWS=_ROWS,
            COLUMNS=_SWIGLU_COLUMNS,
            DEPTH=_DEPTH,
            EXPERTS=_experts(experts),
            **_PIPELINE,
        )
        ctx.save_for_backward(x, gate, up, down, gate_up, ends)
        return _product(hidden, (down,), ends, transposed=False)  # [N, D]

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, gate, up, down, gate_up, ends = ctx.saved_tensors
        grad = grad.contiguous()
        (experts, depth, columns), rows = down.shape, len(x)
        for_gate_up, hidden = torch.empty_like(gate_up), x.new_empty(rows, columns)
        hidden_gradient_kernel[_grid(rows, columns, experts, _SWIGLU_COLUMNS)](
            grad,
            down,
            gate_up,
            for_gate_up,
            hidden,
            ends,
            rows,
            columns,
            depth,
            experts,
            EVEN=depth % _DEPTH == 0,
            ROWS=_ROWS,
            COLUMNS=_SWIGLU_COLUMNS,
            DEPTH=_DEPTH,
            EXPERTS=_experts(experts),
            **_PIPELINE,
        )
        for_x = for_gate = for_up = for_down = None
        if ctx.needs_input_grad[0]:
            for_x = _product(for_gate_up, (gate, up), ends, transposed=True)  # [N, D]
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:  # experts may be frozen
            for_gate, for_up = _weight_gradient(for_gate_up, x, ends).unbind()  # [E, F, D] each
        if ctx.needs_input_grad[3]:
            for_down = _weight_gradient(grad[None], hidden, ends)[0]  # [E, D, F]
        return for_x, for_gate, for_up, for_down, None


def expert_mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, groups: Groups) -> Tensor:
    """An `ExpertMlp` for bf16, of any widths; torch's, one expert at a time, for other dtypes."""
    if x.dtype != torch.bfloat16:
        return ComposedExpertMlp(reference_grouped_linear, swiglu)(x, gate, up, down, groups)
    return _ExpertMlp.apply(x.contiguous(), gate.contiguous(), up.contiguous(), down.contiguous(), groups.ends)
