"""What a run computes again in the backward pass of the vision encoder, beyond blocks."""

import re

from megavl.config.parameters import parameters_of_encoder
from megavl.config.run import RunConfig

# What lies in a block of a tower, or before one.
_UP_TO_BLOCKS = re.compile(r"^stem\.(siglip|sam)\.(patch_embed|pos_embed|blocks)\b")


def encodes_again(config: RunConfig) -> bool:
    """Whether a chunk of tiles is encoded a second time when its gradient has come back (`train.recompute_towers` where
    tiles are encoded before the passes). Where no block of a tower needs a gradient, there is nothing to gain: the
    blocks keep no activations."""
    return (
        config.train.recompute_towers
        and config.parallel.encodes_ahead
        and any(
            config.optim.lr_multiplier(parameter.name) > 0
            for parameter in parameters_of_encoder(config.model)
            if _UP_TO_BLOCKS.match(parameter.name)
        )
    )
