"""Linear layers of the decoder, column- and row-parallel (Megatron-LM, arXiv 1909.08053, section 3) or whole; no bias.

A parallel region is `enter_parallel -> ColumnLinear ... RowLinear -> leave_parallel`; entering is the caller's, so that
several column layers (q, k, v; gate, up) share one gather.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megavl.parallel.collectives import leave_parallel, shared_weight
from megavl.parallel.groups import Axis, TensorAxis
from megavl.parallel.shard import mark


def share(total: int, axis: Axis, what: str, over: str = "parallel.tensor") -> int:
    """`total / axis.size`. Raises ValueError where it does not divide."""
    if total % axis.size:
        raise ValueError(f"{what} = {total} does not divide over {over} = {axis.size}")
    return total // axis.size


class ColumnLinear(nn.Module):
    """y = x W^T with the rows of W (output features) cut over the ranks: [T, d_in] -> [T, d_out / tp]."""

    def __init__(self, d_in: int, d_out: int, tp: TensorAxis):
        super().__init__()
        self.weight = mark(nn.Parameter(torch.empty(share(d_out, tp, "output width"), d_in)), 0, tp)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)  # [T, d_out / tp]


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
