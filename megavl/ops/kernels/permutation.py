"""Triton kernels for `megavl.ops.permutation`: each operation is one launch in each direction, the sort two.

One program handles one token (or one row) at its whole width: all of them are bound by memory, and a row in registers
is read once. No kernel uses atomics, so all results are the same in every run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function

from megavl.ops import permutation as reference
from megavl.ops.permutation import Permutation

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # sums are in fp32, so fp64 is left to the reference
# Elements of the comparison of keys with experts in one program of the sort: 64 registers per thread at 4 warps.
_SORT_TILE = 8192
# Programs of the sort, at most: each of them reads the counts of all.
_SORT_PROGRAMS = 128


@triton.jit
def spread_kernel(x, places, rows, width, K: tl.constexpr, BLOCK: tl.constexpr):
    """rows[places[t, j]] = x[t] for all j: a token is read once, not once per row."""
    token = tl.program_id(0).to(tl.int64)  # T * k * D may exceed int32
    column = tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(x + token * width + column, mask=inside)
    for choice in tl.static_range(K):
        place = tl.load(places + token * K + choice)
        tl.store(rows + place * width + column, value, mask=inside)


@triton.jit
def sum_kernel(rows, places, total, width, K: tl.constexpr, BLOCK: tl.constexpr):
    """total[t] = sum over j of rows[places[t, j]], in fp32 and in the order of j."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    value = tl.zeros((BLOCK,), tl.float32)
    for choice in tl.static_range(K):
        place = tl.load(places + token * K + choice)
        value += tl.load(rows + place * width + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(total + token * width + column, value.to(total.dtype.element_ty), mask=inside)


@triton.jit
def combine_kernel(rows, weights, places, total, width, K: tl.constexpr, BLOCK: tl.constexpr):
    """total[t] = sum over j of weights[t, j] * rows[places[t, j]], in fp32 and in the order of j."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    value = tl.zeros((BLOCK,), tl.float32)
    for choice in tl.static_range(K):
        place = tl.load(places + token * K + choice)
        weight = tl.load(weights + token * K + choice)
        value += weight * tl.load(rows + place * width + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(total + token * width + column, value.to(total.dtype.element_ty), mask=inside)


@triton.jit
def combine_gradient_kernel(
    grad, rows, weights, places, for_rows, for_weights, width, K: tl.constexpr, BLOCK: tl.constexpr
):
    """for_rows[places[t, j]] = weights[t, j] * grad[t]; for_weights[t, j] = grad[t] . rows[places[t, j]]."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    upstream = tl.load(grad + token * width + column, mask=inside, other=0.0).to(tl.float32)
    for choice in tl.static_range(K):
        place = tl.load(places + token * K + choice)
        weight = tl.load(weights + token * K + choice)
        row = tl.load(rows + place * width + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(for_rows + place * width + column, (weight * upstream).to(for_rows.dtype.element_ty), mask=inside)
        tl.store(for_weights + token * K + choice, tl.sum(upstream * row, 0))


@triton.jit
def gather_kernel(rows, order, result, width, BLOCK: tl.constexpr):
    """result[i] = rows[order[i]]"""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    source = tl.load(order + row)
    value = tl.load(rows + source * width + column, mask=inside)
    tl.store(result + row * width + column, value, mask=inside)


@triton.jit(do_not_specialize=["size", "blocks"])  # they differ from step to step
def count_kernel(keys, counts, size, blocks, BLOCK: tl.constexpr, EXPERTS: tl.constexpr):
    """counts[p, e]: how many of the keys of program p are e. A program has `blocks` neighbouring blocks of keys."""
    program = tl.program_id(0)
    expert = tl.arange(0, EXPERTS)
    count = tl.zeros((EXPERTS,), tl.int32)
    for block in range(blocks):
        index = (program * blocks + block) * BLOCK + tl.arange(0, BLOCK)
        key = tl.load(keys + index, mask=index < size, other=-1)
        count += tl.sum((key[:, None] == expert[None, :]).to(tl.int32), 0)
    tl.store(counts + program * EXPERTS + expert, count)


@triton.jit(do_not_specialize=["size", "blocks", "programs"])
def place_kernel(
    keys,
    program_counts,
    order,
    inverse,
    counts,
    size,
    blocks,
    programs,
    experts,
    BLOCK: tl.constexpr,
    EXPERTS: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """Stable counting sort from the counts of `count_kernel`: the place of a key is the number of smaller keys plus the
    number of equal keys before it."""
    program = tl.program_id(0)
    expert = tl.arange(0, EXPERTS)
    total = tl.zeros((EXPERTS,), tl.int32)
    before = tl.zeros((EXPERTS,), tl.int32)
    for first in range(0, programs, PROGRAMS):
        other = first + tl.arange(0, PROGRAMS)
        address = program_counts + other[:, None] * EXPERTS + expert[None, :]
        count = tl.load(address, mask=(other < programs)[:, None], other=0)  # [PROGRAMS, EXPERTS]
        total += tl.sum(count, 0)
        before += tl.sum(tl.where((other < program)[:, None], count, 0), 0)
    if program == 0:
        tl.store(counts + expert, total.to(tl.int64), mask=expert < experts)
    free = tl.cumsum(total, 0) - total + before  # [EXPERTS], the place of the next key of each expert
    for block in range(blocks):
        index = (program * blocks + block) * BLOCK + tl.arange(0, BLOCK)
        inside = index < size
        key = tl.load(keys + index, mask=inside, other=-1)
        equal = (key[:, None] == expert[None, :]).to(tl.int32)  # [BLOCK, EXPERTS]
        place = tl.sum(equal * (tl.cumsum(equal, 0) - 1 + free[None, :]), 1)  # [BLOCK]
        tl.store(order + place, index.to(tl.int64), mask=inside)
        tl.store(inverse + index, place.to(tl.int64), mask=inside)
        free += tl.sum(equal, 0)


def _blocks(width: int) -> dict[str, int]:
    """Launch options of a program that holds a row of this width: 16 elements per thread, at most 16 warps."""
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": min(max(block // 512, 1), 16)}


def _served(*tensors: Tensor) -> bool:
    return all(tensor.dtype in _DTYPES for tensor in tensors)


class _Spread(Function):
    @staticmethod
    def forward(ctx, x: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        (tokens, k), width = places.shape, x.shape[1]
        rows = x.new_empty(tokens * k, width)  # [T * k, D]
        if tokens:
            spread_kernel[(tokens,)](x, places, rows, width, K=k, **_blocks(width))
        return rows

    @staticmethod
    def backward(ctx, grad: Tensor):
        (places,) = ctx.saved_tensors
        (tokens, k), width = places.shape, grad.shape[1]
        total = grad.new_empty(tokens, width)  # [T, D]
        if tokens:
            sum_kernel[(tokens,)](grad.contiguous(), places, total, width, K=k, **_blocks(width))
        return total, None


def spread(x: Tensor, tokens: Tensor, places: Tensor) -> Tensor:
    """`megavl.ops.permutation.spread`, from `places` alone. fp64 is the reference's."""
    if not _served(x):
        return reference.spread(x, tokens, places)
    return _Spread.apply(x.contiguous(), places.contiguous())


class _Combine(Function):
    @staticmethod
    def forward(ctx, rows: Tensor, weights: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weights, places)
        (tokens, k), width = places.shape, rows.shape[1]
        total = rows.new_empty(tokens, width)  # [T, D]
        if tokens:
            combine_kernel[(tokens,)](rows, weights, places, total, width, K=k, **_blocks(width))
        return total

    @staticmethod
    def backward(ctx, grad: Tensor):
        rows, weights, places = ctx.saved_tensors
        (tokens, k), width = places.shape, rows.shape[1]
        for_rows, for_weights = torch.empty_like(rows), torch.empty_like(weights)
        if tokens:
            combine_gradient_kernel[(tokens,)](
                grad.contiguous(), rows, weights, places, for_rows, for_weights, width, K=k, **_blocks(width)
            )
        return for_rows, for_weights, None


def combine(rows: Tensor, weights: Tensor, places: Tensor) -> Tensor:
    """`megavl.ops.permutation.combine`. Weights of another dtype than fp32, and rows of fp64, are the reference's."""
    if not (_served(rows) and weights.dtype == torch.float32):
        return reference.combine(rows, weights, places)
    return _Combine.apply(rows.contiguous(), weights.contiguous(), places.contiguous())


def _gather(rows: Tensor, order: Tensor) -> Tensor:
    count, width = len(order), rows.shape[1]
    result = rows.new_empty(count, width)  # [N, D]
    if count:
        gather_kernel[(count,)](rows.contiguous(), order, result, width, **_blocks(width))
    return result


class _Permute(Function):
    @staticmethod
    def forward(ctx, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return _gather(rows, order)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (inverse,) = ctx.saved_tensors
        return _gather(grad, inverse), None, None


def permute(rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """`megavl.ops.permutation.permute`, for any dtype."""
    return _Permute.apply(rows, order.contiguous(), inverse.contiguous())


def sort_by_expert(experts: Tensor, total: int) -> tuple[Tensor, Tensor, Tensor]:
    """`megavl.ops.permutation.sort_by_expert` as a counting sort in two launches: N keys below 2^31."""
    size = len(experts)
    order, inverse = torch.empty_like(experts), torch.empty_like(experts)
    if not size:
        return order, inverse, experts.new_zeros(total)
    padded = triton.next_power_of_2(max(total, 16))
    block = max(_SORT_TILE // padded, 16)
    blocks = triton.cdiv(size, block * _SORT_PROGRAMS)
    programs = triton.cdiv(size, block * blocks)
    program_counts = experts.new_empty(programs, padded, dtype=torch.int32)
    counts = experts.new_empty(total)
    keys = experts.contiguous()
    count_kernel[(programs,)](keys, program_counts, size, blocks, BLOCK=block, EXPERTS=padded)
    place_kernel[(programs,)](
        keys,
        program_counts,
        order,
        inverse,
        counts,
        size,
        blocks,
        programs,
        total,
        BLOCK=block,
        EXPERTS=padded,
        PROGRAMS=block,
    )
    return order, inverse, counts


TRITON_PERMUTATION = Permutation(spread, combine, permute, sort_by_expert)
