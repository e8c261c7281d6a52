"""Whether the stages of a run fit the memory of its devices (`parallel.device`)."""

from megavl.config.error import ConfigError
from megavl.config.run import RunConfig
from megavl.plan.hardware import usable_bytes
from megavl.plan.mix import expected_steps
from megavl.plan.peak import PeakBytes, StepMemory, rank_peaks
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
    peaks = rank_peaks(memories, split_model(config, world))
    worst = max(range(len(peaks)), key=lambda rank: peaks[rank].total)
    peak = peaks[worst]
    if peak.total <= usable_bytes(device):
        return None
    part, size = max(_parts(peak).items(), key=lambda each: each[1])
    return (
        f"parallel.device = {device}: pipeline rank {worst} would need {_gib(peak.total)} in a step, but "
        f"{_gib(usable_bytes(device))} of a device are for the run, which would end without memory. Most of it, "
        f"{_gib(size)}, are {part}: {_REMEDIES[part]}, or set parallel.device=null to start all the same"
    )


def _parts(peak: PeakBytes) -> dict[str, int]:
    """What `_REMEDIES` are for. The passes and the encoding of images do not come at a time."""
    passes = peak.activations + peak.workspace + peak.messages
    return {
        "weights, gradients and optimizer": peak.state.total,
        "activations of the passes": passes if passes > peak.encoding else 0,
        "images of a step": peak.images,
        "the encoding of images": peak.encoding if passes <= peak.encoding else 0,
    }


_REMEDIES = {
    "weights, gradients and optimizer": "raise parallel.tensor, parallel.pipeline or, with more ranks, the data axis",
    "activations of the passes": "recompute more (train.recompute), or raise parallel.tensor",
    "images of a step": "set train.recompute_towers=true where towers are trained, start more ranks, or lower "
    "train.global_batch, so that a rank has fewer tiles in a step",
    "the encoding of images": "lower parallel.vision_chunk",
}


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.1f} GiB"
