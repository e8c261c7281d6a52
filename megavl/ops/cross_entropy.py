"""Cross entropy over the columns of the vocabulary that one rank has: statistics of the rows, and their gradient.

As in DeepSeek-LLM (arXiv 2401.02954, section 2.4) the logits stay in their own dtype, are read as fp32 block by block,
and are overwritten with their gradient.

`columns`, int64 [T], is the column of each row's label on this rank; -1 if it is on another rank or there is no label.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# Rows that are in fp32 at a time: 256 rows of a 102,400-word vocabulary are 105 MB.
_BLOCK_ROWS = 256


class RowStatistics(NamedTuple):
    """Of each row over the columns of this rank, float32 [T].

    maximum:     largest logit
    total:       sum of exp(logit - maximum)
    label_logit: 0 where the label is not in these columns
    """

    maximum: Tensor
    total: Tensor
    label_logit: Tensor


@dataclass(frozen=True)
class CrossEntropy:
    """One implementation.

    statistics:     (logits [T, V / tp], columns) -> RowStatistics
    write_gradient: (logits [T, V / tp], columns, log_normaliser float32 [T]) -> None. Overwrites the logits with
                    exp(logit - log_normaliser) - [1 where the label is]; a normaliser of infinity gives a row of zeros
    """

    statistics: Callable[[Tensor, Tensor], RowStatistics]
    write_gradient: Callable[[Tensor, Tensor, Tensor], None]


def _blocks(rows: int) -> list[slice]:
    return [slice(start, start + _BLOCK_ROWS) for start in range(0, rows, _BLOCK_ROWS)]


def row_statistics(logits: Tensor, columns: Tensor) -> RowStatistics:
    """See `CrossEntropy`."""
    maximum = logits.amax(dim=1).float()  # [T]
    total = torch.empty_like(maximum)
    for block in _blocks(len(logits)):
        total[block] = (logits[block].float() - maximum[block, None]).exp_().sum(dim=1)
    at_label = logits.gather(1, columns.clamp(min=0)[:, None]).squeeze(1)  # [T]
    return RowStatistics(maximum, total, at_label.float().masked_fill(columns < 0, 0.0))


def write_gradient(logits: Tensor, columns: Tensor, log_normaliser: Tensor) -> None:
    """See `CrossEntropy`."""
    places, minus_one_hot = columns.clamp(min=0)[:, None], -(columns >= 0).float()[:, None]  # [T, 1] each
    for block in _blocks(len(logits)):
        gradient = (logits[block].float() - log_normaliser[block, None]).exp_()
        logits[block] = gradient.scatter_add_(1, places[block], minus_one_hot[block])


REFERENCE_CROSS_ENTROPY = CrossEntropy(row_statistics, write_gradient)
