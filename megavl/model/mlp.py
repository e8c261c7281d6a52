"""Feed-forward layer of the decoder: SwiGLU, its width cut over the tensor axis."""

from torch import Tensor, nn

from megavl.config.model import DecoderConfig
from megavl.ops.dispatch import Ops
from megavl.parallel.collectives import enter_parallel
from megavl.parallel.groups import TensorAxis
from megavl.parallel.linear import ColumnLinear, RowLinear


class Mlp(nn.Module):
    """[T, D] -> [T, D] ([T / tp, D] under sequence parallelism)."""

    def __init__(self, config: DecoderConfig, tp: TensorAxis, ops: Ops):
        super().__init__()
        self.tp, self.ops = tp, ops
        self.gate_proj = ColumnLinear(config.width, config.mlp_width, tp)
        self.up_proj = ColumnLinear(config.width, config.mlp_width, tp)
        self.down_proj = RowLinear(config.mlp_width, config.width, tp)

    def forward(self, h: Tensor) -> Tensor:
        h = enter_parallel(h, self.tp)  # [T, D]
        return self.down_proj(self.ops.swiglu(self.gate_proj(h), self.up_proj(h)))  # [T, mlp / tp] -> [T, D]
