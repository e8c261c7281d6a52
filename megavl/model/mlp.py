"""Feed-forward layer of the decoder, or its shared experts: SwiGLU, its width cut over the tensor axis."""

from torch import Tensor, nn

from megavl.batch import Batch
from megavl.ops.dispatch import Ops
from megavl.parallel.collectives import enter_parallel
from megavl.parallel.groups import TensorAxis
from megavl.parallel.linear import ColumnLinear, RowLinear


class Mlp(nn.Module):
    """[T, D] -> [T, D] ([T / tp, D] under sequence parallelism), `hidden` channels within."""

    def __init__(self, width: int, hidden: int, tp: TensorAxis, ops: Ops):
        super().__init__()
        self.tp, self.ops = tp, ops
        self.gate_proj = ColumnLinear(width, hidden, tp)
        self.up_proj = ColumnLinear(width, hidden, tp)
        self.down_proj = RowLinear(hidden, width, tp)

    def forward(self, h: Tensor, batch: Batch) -> Tensor:
        """`batch` is what every layer of a block gets; this one does not read it."""
        h = enter_parallel(h, self.tp)  # [T, D]
        return self.down_proj(self.ops.swiglu(self.gate_proj(h), self.up_proj(h)))  # [T, hidden / tp] -> [T, D]
