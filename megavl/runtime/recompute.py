"""Activation checkpointing: a block keeps its input and computes its activations again in the backward pass."""

from contextlib import AbstractContextManager, nullcontext

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megavl.model.block import Block
from megavl.model.layout import PackLayout
from megavl.model.vlm import RunBlock


def recomputing(products: AbstractContextManager) -> RunBlock:
    """The `run_block` of a `VLM` whose blocks recompute. It changes no value.

    Args:
        products: the context that the forward pass runs in. Autograd leaves it for the backward pass, and what is
            computed again there has to be the same.
    """

    def run_block(block: Block, h: Tensor, layout: PackLayout) -> Tensor:
        return checkpoint(block, h, layout, use_reentrant=False, context_fn=lambda: (nullcontext(), products))

    return run_block
