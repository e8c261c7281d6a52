"""Activation checkpointing: a block keeps its input and computes its activations again in the backward pass."""

from functools import partial

from torch.utils.checkpoint import checkpoint

from megavl.model.vlm import VLM


def recompute_blocks(vlm: VLM) -> None:
    """Make each decoder block recompute. Its name, parameters and results stay as they are."""
    for block in vlm.blocks.values():
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
