"""Activation checkpointing: a block keeps its input and computes its activations again in the backward pass."""

from contextlib import AbstractContextManager, nullcontext
from functools import partial

from torch.utils.checkpoint import checkpoint

from megavl.model.vlm import VLM


def recompute_blocks(vlm: VLM, products: AbstractContextManager) -> None:
    """Make each decoder block recompute. Its name, parameters and results stay as they are.

    products: the context that the forward pass runs in; autograd leaves it for the backward pass, and what is computed
              again there has to be the same
    """
    for block in vlm.blocks.values():
        block.forward = partial(
            checkpoint, block.forward, use_reentrant=False, context_fn=lambda: (nullcontext(), products)
        )
