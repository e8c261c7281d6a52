"""Feed-forward layer of the decoder, or its shared experts: SwiGLU, its width cut over the tensor axis."""

from torch import Tensor, nn

from megavl.ops.dispatch import Ops
from megavl.parallel.groups import TensorAxis
from megavl.parallel.linear import ColumnLinear, RowLinear, column_linears


class Mlp(nn.Module):
    """[T, D] -> [T, D] ([T / tp, D] under sequence parallelism), `hidden` channels within."""

    def __init__(self, width: int, hidden: int, tp: TensorAxis, ops: Ops):
        super().__init__()
        self.ops = ops
        self.gate_proj = ColumnLinear(width, hidden, tp)
        self.up_proj = ColumnLinear(width, hidden, tp)
        self.down_proj = RowLinear(hidden, width, tp)

    def forward(self, h: Tensor) -> Tensor:
        gate, up = column_linears(h, (self.gate_proj, self.up_proj))  # [T, hidden / tp] each
        return self.down_proj(self.ops.swiglu(gate, up))  # [T, hidden / tp] -> [T, D]
