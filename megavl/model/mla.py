"""Multi-head latent attention of the decoder (DeepSeek-V2, arXiv 2405.04434, section 2.1), queries uncompressed.

Source of the order of channels: `DeepseekV2Attention` (modeling_deepseek.py) of the released DeepSeek-VL2 code.
"""

from torch import Tensor, nn

from megavl.config.model import DecoderConfig
from megavl.model.layout import PackLayout
from megavl.model.norm import RmsNorm
from megavl.ops.dispatch import Ops
from megavl.parallel.groups import TensorAxis
from megavl.parallel.linear import ColumnLinear, RowLinear, SharedLinear, column_linear_with, share


class LatentAttention(nn.Module):
    """Causal within each document of the pack. [T, D] -> [T, D] ([T / tp, D] under sequence parallelism).

    The heads are cut over the tensor axis. The latent, of which the keys and values of all heads are made, is computed
    from the residual stream's own tokens by weights that every rank has, and enters the parallel region as h does; the
    positioned channels of the keys enter with it.

    Raises ValueError where the heads are not divisible by the tensor axis.
    """

    def __init__(self, config: DecoderConfig, tp: TensorAxis, ops: Ops):
        super().__init__()
        mla = config.mla
        self.mla, self.ops = mla, ops
        self.heads = share(config.heads, tp, "model.decoder.heads")
        self.q_proj = ColumnLinear(config.width, config.heads * mla.key_width, tp)
        self.kv_down_proj = SharedLinear(config.width, mla.kv_rank + mla.rope_width, tp)
        self.kv_norm = RmsNorm(mla.kv_rank, config.norm_eps, tp, ops)
        self.kv_up_proj = ColumnLinear(mla.kv_rank, config.heads * (mla.nope_width + mla.value_width), tp)
        self.o_proj = RowLinear(config.heads * mla.value_width, config.width, tp)

    def forward(self, h: Tensor, layout: PackLayout) -> Tensor:
        mla = self.mla
        # [T, kv_rank] and [T, rope], or [T / tp, ...] under sequence parallelism
        latent, k_rope = self.kv_down_proj(h).split((mla.kv_rank, mla.rope_width), dim=1)
        kv, k_rope = column_linear_with(self.kv_norm(latent), self.kv_up_proj, k_rope)  # k_rope: [T, rope]
        kv = kv.unflatten(1, (self.heads, -1))  # [T, heads / tp, nope + value]
        q = self.q_proj(h).unflatten(1, (self.heads, -1))  # [T, heads / tp, nope + rope]
        # All heads share the positioned channels of a key. q and k: [T, heads / tp, nope + rope]
        q, k, v = self.ops.rotate_latent(q, kv, k_rope.unsqueeze(1), layout.cos, layout.sin)
        attended = self.ops.attention(q, k, v, layout.cu_seqlens, layout.lengths)  # [T, heads / tp, value]
        return self.o_proj(attended.flatten(1))  # [T, heads * value / tp] -> [T, D]
