"""Stand-in for a Hopper GPU with torch and none of the optional libraries."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

LIBRARIES = ("flash_attn", "fused_layer_norm_cuda", "grouped_gemm", "triton")


@contextmanager
def hopper() -> Iterator[None]:
    """While entered, `choose` finds such a machine."""
    with pytest.MonkeyPatch.context() as patch:
        for name in LIBRARIES:
            patch.setitem(sys.modules, name, None)
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        patch.setattr(torch.cuda, "get_device_name", lambda device: "Stand-in")
        yield
