"""Whether the stages of a run fit the memory of its devices (`parallel.device`)."""

from megavl.config.error import ConfigError
from megavl.config.run import RunConfig
from megavl.plan.hardware import usable_bytes
from megavl.plan.mix import expected_steps
from megavl.plan.peak import StepMemory, rank_peaks
from megavl.plan.split import split_model


def check_memory(config: RunConfig, world: int) -> None:
    """Raise ConfigError if the run has to fit a device, and its stages do not."""
    if problem := memory_problem(config, world):
        raise ConfigError("this run does not fit its devices", [problem])


def memory_problem(config: RunConfig, world: int) -> str | None:
    """What `check_memory` refuses."""
    device = config.parallel.device
    if device is None:
        return None
    memories = [StepMemory(config, world, step) for step in expected_steps(config) if step.share > 0]
    peaks = [peak.total for peak in rank_peaks(memories, split_model(config, world))]
    worst = peaks.index(max(peaks))
    if peaks[worst] <= usable_bytes(device):
        return None
    return (
        f"parallel.device = {device}: pipeline rank {worst} would need {_gib(peaks[worst])} in a step, but "
        f"{_gib(usable_bytes(device))} of a device are for the run, which would end without memory; recompute more "
        "(train.recompute, train.recompute_towers), raise parallel.tensor or parallel.pipeline, or set "
        "parallel.device=null to start all the same"
    )


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.1f} GiB"
