"""Activation of the decoder's feed-forward layer."""

import torch.nn.functional as F
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (arXiv 2002.05202), elementwise over equal shapes."""
    return F.silu(gate) * up
