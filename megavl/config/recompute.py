"""Whether the backward pass of the vision encoder recomputes whole chunks of tiles."""

import re

from megavl.config.parameters import parameters_of_encoder
from megavl.config.run import RunConfig

# What lies in a block of a tower, or before one.
_UP_TO_BLOCKS = re.compile(r"^stem\.(siglip|sam)\.(patch_embed|pos_embed|blocks)\b")


def encodes_again(config: RunConfig) -> bool:
    """Whether a chunk of tiles is encoded a second time when its gradient has returned.

    It is under `train.recompute_towers` where tiles are encoded before the passes. If no block of a tower needs a
    gradient, the blocks keep no activations, and there is nothing to gain.
    """
    return (
        config.train.recompute_towers
        and config.parallel.encodes_ahead
        and any(
            config.optim.lr_multiplier(parameter.name) > 0
            for parameter in parameters_of_encoder(config.model)
            if _UP_TO_BLOCKS.match(parameter.name)
        )
    )
