"""Squared norm of gradients: exact sums without a copy of the gradients in fp64."""

import torch
from torch import Tensor

# Elements that are summed in fp32; their sums are added in fp64.
_ROW = 64


def squared_norm(x: Tensor) -> Tensor:
    """Sum of the squares of x, fp32 of any shape, contiguous: float64 []."""
    x = x.view(-1)
    rows, rest = x.split([len(x) // _ROW * _ROW, len(x) % _ROW])
    norms = torch.linalg.vector_norm(rows.view(-1, _ROW), dim=1)  # [N / 64]
    return norms.double().square().sum() + rest.double().square().sum()
