"""Last item of the model list: final norm, vocabulary projection, loss."""

from torch import Tensor, nn

from megavl.config.model import DecoderConfig
from megavl.config.tokens import IGNORE_INDEX
from megavl.model.norm import ResidualNorm
from megavl.ops.dispatch import Ops
from megavl.parallel.cross_entropy import summed_cross_entropy
from megavl.parallel.groups import TensorAxis
from megavl.parallel.linear import ColumnLinear


class Head(nn.Module):
    """Untied from the embedding, as DeepSeek-LLM's is."""

    def __init__(self, config: DecoderConfig, tp: TensorAxis, ops: Ops):
        super().__init__()
        self.tp, self.ops = tp, ops
        self.norm = ResidualNorm(config.width, config.norm_eps, tp, ops)
        self.proj = ColumnLinear(config.width, config.vocab_size, tp)

    def logits(self, h: Tensor, delta: Tensor | None = None) -> Tensor:
        """[T, D] ([T / tp, D] under sequence parallelism) -> [T, V / tp], this rank's columns of the vocabulary. What
        the last block has left to add to `h` is `delta`, of the same shape."""
        _, x = self.norm(h, delta)
        return self.proj(x)  # [T, V / tp]

    def forward(self, h: Tensor, labels: Tensor, delta: Tensor | None = None) -> Tensor:
        """Sum over the supervised tokens of -log p(label), in nats.

        A sum, not a mean: the divisor is the number of supervised tokens of the whole global batch.

        Args:
            h: [T, D], or [T / tp, D] under sequence parallelism
            labels: int64 [T], as in `Batch`
            delta: what the last block has left to add to `h`, of its shape; None if there is nothing

        Returns:
            float32 [], equal on all tp ranks
        """
        return summed_cross_entropy(self.logits(h, delta), labels, IGNORE_INDEX, self.tp, self.ops.cross_entropy)
