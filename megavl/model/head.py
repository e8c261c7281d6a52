"""Last item of the model list: final norm, vocabulary projection, loss."""

from torch import Tensor, nn

from megavl.config.model import DecoderConfig
from megavl.config.tokens import IGNORE_INDEX
from megavl.model.norm import RmsNorm
from megavl.ops.dispatch import Ops
from megavl.parallel.cross_entropy import summed_cross_entropy
from megavl.parallel.groups import TensorAxis
from megavl.parallel.linear import ColumnLinear, enter_with_rows


class Head(nn.Module):
    """Untied from the embedding, as DeepSeek-LLM's is."""

    def __init__(self, config: DecoderConfig, tp: TensorAxis, ops: Ops):
        super().__init__()
        self.tp, self.ops = tp, ops
        self.norm = RmsNorm(config.width, config.norm_eps, tp, ops)
        self.proj = ColumnLinear(config.width, config.vocab_size, tp)

    def logits(self, h: Tensor) -> Tensor:
        """[T, D] ([T / tp, D] under sequence parallelism) -> [T, V / tp], this rank's columns of the vocabulary."""
        return self.proj(self.norm(h))  # [T, V / tp]

    def forward(self, h: Tensor, labels: Tensor, supervised: Tensor) -> Tensor:
        """Sum over the supervised tokens of -log p(label), in nats.

        A sum, not a mean: the divisor is the number of supervised tokens of the whole global batch.

        Args:
            h: [T, D], or [T / tp, D] under sequence parallelism
            labels: int64 [T], as in `Batch`
            supervised: int64 [S], as in `Batch`; the other positions have no logits

        Returns:
            float32 [], equal on all tp ranks
        """
        x = enter_with_rows(self.norm(h), supervised, self.tp)  # [S, D]
        labels = labels.index_select(0, supervised)  # [S]
        return summed_cross_entropy(x, self.proj.weight, labels, IGNORE_INDEX, self.tp, self.ops.cross_entropy)
