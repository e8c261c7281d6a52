"""SwiGLU against its formula."""

import torch

from megavl.ops.activation import swiglu


def test_formula():
    gate, up = torch.randn(2, 7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(swiglu(gate, up), gate / (1 + torch.exp(-gate)) * up)
