"""Token embedding with the vocabulary cut over the tensor axis (Megatron-LM section 3)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megavl.parallel.collectives import reduce
from megavl.parallel.groups import TensorAxis
from megavl.parallel.linear import share
from megavl.parallel.shard import mark


class VocabEmbedding(nn.Module):
    """int64 [T] -> [T, D], equal on all ranks of the axis. A token outside this rank's rows contributes zeros here."""

    def __init__(self, vocab_size: int, width: int, tp: TensorAxis):
        super().__init__()
        self.tp = tp
        rows = share(vocab_size, tp, "model.decoder.vocab_size")
        self.first = tp.rank * rows
        self.weight = mark(nn.Parameter(torch.empty(rows, width)), 0, tp)

    def forward(self, tokens: Tensor) -> Tensor:
        if self.tp.size == 1:
            return F.embedding(tokens, self.weight)  # [T, D]
        local = tokens - self.first
        foreign = (local < 0) | (local >= self.weight.shape[0])
        rows = F.embedding(local.masked_fill(foreign, 0), self.weight)  # [T, D]
        return reduce(rows.masked_fill(foreign.unsqueeze(-1), 0.0), self.tp)
