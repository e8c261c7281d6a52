"""One decoder block."""

from torch import Tensor, nn

from megavl.config.model import DecoderConfig
from megavl.model.attention import Attention
from megavl.model.layout import PackLayout
from megavl.model.mla import LatentAttention
from megavl.model.mlp import Mlp
from megavl.model.moe import Moe
from megavl.model.norm import ResidualNorm
from megavl.ops.dispatch import Ops
from megavl.parallel.groups import ExpertAxis, TensorAxis


class Block(nn.Module):
    """Pre-norm attention and feed-forward. Their outputs are added to the residual stream in the norm that follows: in
    this block, in the next one or in the head.

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
        self.attn_norm = ResidualNorm(config.width, config.norm_eps, tp, ops)
        self.attn = Attention(config, tp, ops) if config.mla is None else LatentAttention(config, tp, ops)
        self.mlp_norm = ResidualNorm(config.width, config.norm_eps, tp, ops)
        if config.has_experts(layer):
            self.mlp = Moe(config.moe, config.width, tp, ep, ops, auxiliary_scale)
        else:
            self.mlp = Mlp(config.width, config.mlp_width, tp, ops)

    def forward(self, h: Tensor, layout: PackLayout, delta: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Run the block on the residual stream h + delta.

        Args:
            h: [T, D], or [T / tp, D] on each rank under sequence parallelism
            delta: what the block before has left to add to `h`, of its shape; None if there is nothing

        Returns:
            The stream after attention, and the output of the feed-forward layer, which is still to be added to it.
        """
        h, x = self.attn_norm(h, delta)
        h, x = self.mlp_norm(h, self.attn(x, layout))
        return h, self.mlp(x, layout.packs) if isinstance(self.mlp, Moe) else self.mlp(x)
