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


class ResidualNorm(RmsNorm):
    """RMSNorm of the residual stream, after the addition of the layer output in front of it: one kernel does both."""

    def forward(self, h: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        """Add and normalise.

        Args:
            h: residual stream, [T, D], or [T / tp, D] under sequence parallelism
            delta: what is to be added to it, of its shape; None if there is nothing

        Returns:
            h + delta and its normalised values, both of the shape of `h`
        """
        if delta is None:
            return h, super().forward(h)
        return self.ops.add_rms_norm(h, delta, shared_weight(self.weight, self.tp), self.eps)
