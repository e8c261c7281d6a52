"""RMSNorm of the decoder as a layer."""

import torch
from torch import Tensor, nn

from megavl.ops.dispatch import Ops
from megavl.parallel.collectives import shared_weight
from megavl.parallel.groups import TensorAxis


class RmsNorm(nn.Module):
    """[T, D] -> [T, D], or [T / tp, D] -> [T / tp, D] under sequence parallelism, where each rank's weight gradient
    covers its own tokens and `shared_weight` adds them up."""

    def __init__(self, width: int, eps: float, tp: TensorAxis, ops: Ops):
        super().__init__()
        self.eps, self.tp, self.ops = eps, tp, ops
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.rms_norm(x, shared_weight(self.weight, self.tp), self.eps)

    def of_sum(self, h: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """h + delta and its normalised values, both of the shape of `h`; one kernel where the operator has one."""
        return self.ops.add_rms_norm(h, delta, shared_weight(self.weight, self.tp), self.eps)
