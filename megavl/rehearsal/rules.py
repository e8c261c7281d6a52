"""What keeps a rank from being executed on fake tensors, checked before torch is imported."""

from megavl.config.error import ConfigError
from megavl.config.run import RunConfig


def check_rank(config: RunConfig, world: int, rank: int) -> None:
    """Raise ConfigError with every reason why `rank` of `world` cannot be executed.

    The configuration must have passed `megavl.config.rules.check` for that world.
    """
    problems = []
    if not 0 <= rank < world:
        problems.append(f"{world} ranks have no rank {rank}: choose one from 0 to {world - 1}, or another --world")
    if config.zero_stage(world // config.parallel.model) > 1:
        problems.append(
            f"parallel.zero = {config.parallel.zero}: DeepSpeed then compares numbers of all ranks on the host, and "
            "fake tensors have none: execute it with parallel.zero=1"
        )
    if config.train.compile:
        problems.append(
            "train.compile = true: torch compiles for a device that is there: execute it with train.compile=false"
        )
    if problems:
        raise ConfigError(f"rank {rank} cannot be executed", problems)
