"""Recipes in one process, without recomputation: what every topology is compared with."""

from megavl.config.load import load_run
from megavl.config.rules import check
from megavl.config.run import RunConfig

_ONE_PROCESS = (
    *("parallel.tensor=1", "parallel.sequence=false", "parallel.pipeline=1", "parallel.stages=null"),
    *("parallel.expert=1", "parallel.vision=replicated", "train.recompute=off", "train.micro_batch=1"),
)


def load_one_process(recipe: str, *overrides: str) -> RunConfig:
    """The recipe in one process, then the overrides.

    Raises:
        ConfigError: it cannot run in one process.
    """
    config = load_run(recipe, [*_ONE_PROCESS, *overrides])
    check(config, world=1)
    return config
