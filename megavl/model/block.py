"""One decoder block."""

from torch import Tensor, nn

from megavl.config.model import DecoderConfig
from megavl.model.attention import Attention
from megavl.model.layout import PackLayout
from megavl.model.mla import LatentAttention
from megavl.model.mlp import Mlp
from megavl.model.moe import Moe
from megavl.model.norm import RmsNorm
from megavl.ops.dispatch import Ops
from megavl.parallel.groups import ExpertAxis, TensorAxis


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream. [T, D] -> [T, D], or [T / tp, D] on each
    rank under sequence parallelism.

    Args:
        layer: index among the blocks of the whole model
        auxiliary_scale: of the router, as in `Router`
    """

    def __init__(
        self,
        config: DecoderConfig,
        layer: int,
        tp: TensorAxis,
        ep: ExpertAxis,
        ops: Ops,
        auxiliary_scale: float = 0.0,
    ):
        super().__init__()
        self.attn_norm = RmsNorm(config.width, config.norm_eps, tp, ops)
        self.attn = Attention(config, tp, ops) if config.mla is None else LatentAttention(config, tp, ops)
        self.mlp_norm = RmsNorm(config.width, config.norm_eps, tp, ops)
        if config.has_experts(layer):
            self.mlp = Moe(config.moe, config.width, tp, ep, ops, auxiliary_scale)
        else:
            self.mlp = Mlp(config.width, config.mlp_width, tp, ops)

    def forward(self, h: Tensor, layout: PackLayout) -> Tensor:
        h, x = self.mlp_norm.of_sum(h, self.attn(self.attn_norm(h), layout))
        return h + (self.mlp(x, layout.packs) if isinstance(self.mlp, Moe) else self.mlp(x))
