"""Squared norm of gradients: exact sums without a copy of the gradients in fp64."""

import torch
from torch import Tensor

# Elements that are summed in fp32; their sums are added in fp64.
_ROW = 64


def squared_norm(x: Tensor) -> Tensor:
    """Sum of the squares of x, fp32 of any shape, contiguous: float64 []."""
    x = x.view(-1)
    whole = len(x) - len(x) % _ROW
    # No kernel gets an empty operand.
    parts = [part for part in (x[:whole].view(-1, _ROW), x[whole:].view(-1, 1)) if len(part)]
    sums = [torch.linalg.vector_norm(part, dim=1).double().square().sum() for part in parts]  # of [rows] each
    return sum(sums, start=torch.zeros((), dtype=torch.float64, device=x.device))
