"""Cross entropy over logits whose vocabulary is cut over the tensor axis; the full row is never gathered.

Three numbers per token cross ranks: the maximum, the sum of exponentials, the logit of the label. As in DeepSeek-LLM
(arXiv 2401.02954, section 2.4) the logits stay in their own dtype, are read as fp32 block by block, and are overwritten
with their gradient.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from megavl.parallel.groups import Axis

IGNORED = -100
# Rows that are in fp32 at a time: 256 rows of a 102,400-word vocabulary are 105 MB.
_BLOCK_ROWS = 256


class _SummedCrossEntropy(Function):
    @staticmethod
    def forward(ctx, logits: Tensor, labels: Tensor, axis: Axis) -> Tensor:
        rows, vocab = logits.shape
        maximum = logits.amax(dim=1).float()  # [T]
        if axis.size > 1:
            dist.all_reduce(maximum, dist.ReduceOp.MAX, group=axis.group)

        supervised = labels != IGNORED
        local = labels - axis.rank * vocab
        mine = supervised & (local >= 0) & (local < vocab)
        local = local.masked_fill(~mine, 0).unsqueeze(1)  # [T, 1]
        total = torch.empty_like(maximum)
        for start in range(0, rows, _BLOCK_ROWS):
            block = slice(start, start + _BLOCK_ROWS)
            total[block] = (logits[block].float() - maximum[block, None]).exp_().sum(dim=1)
        label_logit = logits.gather(1, local).squeeze(1).float().masked_fill(~mine, 0.0)  # [T]
        if axis.size > 1:
            both = torch.stack([total, label_logit])  # [2, T]
            dist.all_reduce(both, group=axis.group)
            total, label_logit = both
        log_normaliser = maximum + total.log()
        loss = ((log_normaliser - label_logit) * supervised).sum()

        # d loss / d logit = softmax - one_hot, written over the logits.
        for start in range(0, rows, _BLOCK_ROWS):
            block = slice(start, start + _BLOCK_ROWS)
            gradient = (logits[block].float() - log_normaliser[block, None]).exp_()
            gradient.scatter_add_(1, local[block], -mine[block, None].float())
            logits[block] = gradient.mul_(supervised[block, None])
        ctx.gradient = logits
        return loss

    @staticmethod
    def backward(ctx, grad: Tensor):
        return ctx.gradient.mul_(grad), None, None


def summed_cross_entropy(logits: Tensor, labels: Tensor, axis: Axis) -> Tensor:
    """Sum over the supervised tokens of -log softmax(logits)[label], in nats.

    logits: [T, V / tp], this rank's columns, float or bfloat16; overwritten
    labels: int64 [T], ids of the full vocabulary, -100 where nothing is supervised
    returns: float32 [], equal on all ranks of the axis
    """
    return _SummedCrossEntropy.apply(logits, labels, axis)
