"""How the blocks of the decoder and of the towers are called: with or without recomputation."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

# (block, *inputs) -> output of the block.
RunBlock = Callable[..., Tensor]


def call_block(block: nn.Module, *inputs: Any) -> Tensor:
    """Call the block. Autograd keeps its activations for the backward pass."""
    return block(*inputs)
