"""Several tensors in one buffer, so that one message carries all of them."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from megavl.runtime.deepspeed.alignment import UNIT_ELEMENTS


class Flat:
    """A buffer of zeros with a view for each tensor, each at a multiple of `UNIT_ELEMENTS`: a GEMM on a misaligned
    weight takes two to three times as long.

    buffer: [N]
    views:  of the shapes that were asked for
    """

    def __init__(self, shapes: Sequence[torch.Size], dtype: torch.dtype, device: torch.device):
        units = [-(-shape.numel() // UNIT_ELEMENTS) for shape in shapes]
        starts = [UNIT_ELEMENTS * unit for unit in accumulate(units, initial=0)]
        self.buffer = torch.zeros(starts[-1], dtype=dtype, device=device)
        self.views: list[Tensor] = [
            self.buffer[start : start + shape.numel()].view(shape) for start, shape in zip(starts, shapes, strict=False)
        ]
