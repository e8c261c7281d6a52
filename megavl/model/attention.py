"""Self-attention of the decoder (DeepSeek-LLM, arXiv 2401.02954: Llama's), heads cut over the tensor axis."""

from torch import Tensor, nn

from megavl.config.model import DecoderConfig
from megavl.model.layout import PackLayout
from megavl.ops.dispatch import Ops
from megavl.parallel.groups import TensorAxis
from megavl.parallel.linear import ColumnLinear, RowLinear, column_linears, share


class Attention(nn.Module):
    """Causal within each document of the pack. [T, D] -> [T, D] ([T / tp, D] under sequence parallelism).

    Raises ValueError where the query or the key heads are not divisible by the tensor axis.
    """

    def __init__(self, config: DecoderConfig, tp: TensorAxis, ops: Ops):
        super().__init__()
        self.heads = share(config.heads, tp, "model.decoder.heads")
        self.kv_heads = share(config.kv_heads, tp, "model.decoder.kv_heads")
        self.head_width, self.ops = config.head_width, ops
        self.q_proj = ColumnLinear(config.width, config.heads * config.head_width, tp)
        self.k_proj = ColumnLinear(config.width, config.kv_heads * config.head_width, tp)
        self.v_proj = ColumnLinear(config.width, config.kv_heads * config.head_width, tp)
        self.o_proj = RowLinear(config.heads * config.head_width, config.width, tp)

    def forward(self, h: Tensor, layout: PackLayout) -> Tensor:
        q, k, v = column_linears(h, (self.q_proj, self.k_proj, self.v_proj))  # [T, width / tp] of each
        q = q.unflatten(1, (self.heads, self.head_width))  # [T, heads / tp, d]
        k = k.unflatten(1, (self.kv_heads, self.head_width))  # [T, kv_heads / tp, d]
        v = v.unflatten(1, (self.kv_heads, self.head_width))  # [T, kv_heads / tp, d]
        q, k = self.ops.rotate_halves(q, k, layout.cos, layout.sin)
        attended = self.ops.attention(q, k, v, layout.cu_seqlens, layout.lengths)  # [T, heads / tp, d]
        return self.o_proj(attended.flatten(1))  # [T, heads * d / tp] -> [T, D]
