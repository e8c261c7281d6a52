"""Activation checkpointing: a block keeps its input and computes its activations again in the backward pass."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megavl.model.run_block import RunBlock


def recomputing(products: AbstractContextManager) -> RunBlock:
    """The `run_block` of a `VLM` or of its towers, whose blocks recompute. It changes no value.

    No state of a random generator is kept, because nothing in a forward pass is random.

    Args:
        products: the context that the forward pass runs in. Autograd leaves it for the backward pass, and what is
            computed again there has to be the same.
    """

    def run_block(block: nn.Module, *inputs: Any) -> Tensor:
        return checkpoint(
            block,
            *inputs,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=lambda: (nullcontext(), products),
        )

    return run_block
