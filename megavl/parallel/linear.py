"""Linear layers of the decoder, column- and row-parallel (Megatron-LM, arXiv 1909.08053, section 3) or whole; no bias.

A parallel region begins with column-parallel products and ends with a row-parallel one. Linear layers enter it by
`column_linears` and `column_linear_with`, with one collective each. Routed experts that are cut in width enter it in
`Moe`.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megavl.parallel.adjacent import are_adjacent, join_rows, split_columns
from megavl.parallel.autograd import with_backward
from megavl.parallel.collectives import enter_parallel, leave_parallel, shared_weight
from megavl.parallel.entry import entry_products
from megavl.parallel.groups import Axis, TensorAxis
from megavl.parallel.shard import mark


def share(total: int, axis: Axis, what: str, over: str = "parallel.tensor") -> int:
    """`total / axis.size`. Raises ValueError if `total` is not divisible."""
    if total % axis.size:
        raise ValueError(f"{what} = {total} is not divisible by {over} = {axis.size}")
    return total // axis.size


class ColumnLinear(nn.Module):
    """y = x W^T with the rows of W (output features) cut over the ranks: [T, d_in] (replicated) or [T / tp, d_in]
    (sequence) -> [T, d_out / tp]. It begins a parallel region; layers that share an input begin it together, by
    `column_linears`."""

    def __init__(self, d_in: int, d_out: int, tp: TensorAxis):
        super().__init__()
        self.tp = tp
        self.weight = mark(nn.Parameter(torch.empty(share(d_out, tp, "output width"), d_in)), 0, tp)

    def forward(self, x: Tensor) -> Tensor:
        (y,) = column_linears(x, [self])
        return y


def column_linears(x: Tensor, layers: Sequence[ColumnLinear]) -> list[Tensor]:
    """Products of one input with several column-parallel weights. They enter the parallel region together: one
    all-gather under sequence parallelism, else none, and one collective for the gradient of the input. Weights that lie
    end to end in memory are multiplied as one, forward and backward, except in a compiled graph.

    The layers are not called, so their hooks do not run. Under ZeRO-3 DeepSpeed gathers a weight when it is first read,
    and from then on together with the calling module's own; that first read must be inside the engine's forward.

    Args:
        x: [T, d_in], or [T / tp, d_in] under sequence parallelism
        layers: at least one, of the same tensor axis

    Returns:
        [T, d_out / tp] of each layer, in the dtype of `x`; of weights that are multiplied as one, columns of one tensor
    """
    tp, weights = layers[0].tp, [layer.weight for layer in layers]
    # A compiled graph serves every block of its kind, wherever its weights lie.
    if len(weights) > 1 and not torch.compiler.is_compiling() and are_adjacent(weights, dim=0):
        (joint,), _ = entry_products(x, [join_rows(weights)], tp)  # [T, sum of the widths / tp]
        return [*split_columns(joint, [len(weight) for weight in weights])]
    outputs, _ = entry_products(x, weights, tp)
    return outputs


def enter_with_rows(x: Tensor, rows: Tensor, tp: TensorAxis) -> Tensor:
    """Enter a parallel region with some of the tokens only.

    Args:
        x: [T, d], or [T / tp, d] under sequence parallelism
        rows: int64 [S], ascending indices of these tokens among all T

    Returns:
        [S, d]
    """
    if tp.sequence:
        return _select(enter_parallel(x, tp), rows)
    return enter_parallel(_select(x, rows), tp)  # only these rows of the gradient are reduced


def _select(x: Tensor, rows: Tensor) -> Tensor:
    """Rows [S, d] of x [T, d]. No row is selected twice, so the gradient is copied: atomic additions are not needed."""
    shape = x.shape  # the tensor itself would live until the backward pass
    return with_backward(
        x,
        forward=lambda x: x.index_select(0, rows),
        backward=lambda grad: grad.new_zeros(shape).index_copy_(0, rows, grad),
    )


def column_linear_with(x: Tensor, layer: ColumnLinear, companion: Tensor) -> tuple[Tensor, Tensor]:
    """Product with a column-parallel weight. `companion` enters the parallel region by the same collective and is not
    multiplied: every rank gets all of it.

    Args:
        x, companion: [T, d_in] and [T, d], or [T / tp, d_in] and [T / tp, d] under sequence parallelism; of one dtype

    Returns:
        [T, d_out / tp] and the companion, [T, d]
    """
    (y,), companion = entry_products(x, [layer.weight], layer.tp, companion)
    return y, companion


class RowLinear(nn.Module):
    """y = x W^T with the columns of W (input features) cut: [T, d_in / tp] -> [T, d_out], or [T / tp, d_out] under
    sequence parallelism. It ends the parallel region."""

    def __init__(self, d_in: int, d_out: int, tp: TensorAxis):
        super().__init__()
        self.tp = tp
        self.weight = mark(nn.Parameter(torch.empty(d_out, share(d_in, tp, "input width"))), 1, tp)

    def forward(self, x: Tensor) -> Tensor:
        return leave_parallel(F.linear(x, self.weight), self.tp)


class SharedLinear(nn.Module):
    """y = x W^T with all of W on every rank, outside of a parallel region: [T, d_in] -> [T, d_out], or [T / tp, d_in]
    -> [T / tp, d_out] under sequence parallelism."""

    def __init__(self, d_in: int, d_out: int, tp: TensorAxis):
        super().__init__()
        self.tp = tp
        self.weight = nn.Parameter(torch.empty(d_out, d_in))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, shared_weight(self.weight, self.tp))
