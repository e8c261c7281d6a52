"""One decoder block."""

from torch import Tensor, nn

from megavl.batch import Batch
from megavl.config.model import DecoderConfig
from megavl.model.attention import Attention
from megavl.model.mlp import Mlp
from megavl.model.norm import RmsNorm
from megavl.ops.dispatch import Ops
from megavl.parallel.groups import TensorAxis


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream. [T, D] -> [T, D], or [T / tp, D] on each
    rank under sequence parallelism."""

    def __init__(self, config: DecoderConfig, tp: TensorAxis, ops: Ops):
        super().__init__()
        self.attn_norm = RmsNorm(config.width, config.norm_eps, tp, ops)
        self.attn = Attention(config, tp, ops)
        self.mlp_norm = RmsNorm(config.width, config.norm_eps, tp, ops)
        self.mlp = Mlp(config, tp, ops)

    def forward(self, h: Tensor, batch: Batch) -> Tensor:
        h = h + self.attn(self.attn_norm(h), batch)
        return h + self.mlp(self.mlp_norm(h))
