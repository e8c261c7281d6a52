"""Stages of the check: what each proves, which module runs it, and its share of the time."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """One process of the check.

    name:     what --only takes, alone or by the part before its dot
    proves:   one line for --help and the report
    module:   of this package, whose `run(setting, results, subject)` it is
    weight_s: expected seconds on an H200; the remaining time is shared in proportion
    subject:  what `run` is called with
    needs:    stage whose results it compares with; selected along with it
    """

    name: str
    proves: str
    module: str
    weight_s: float
    subject: str = ""
    needs: str = ""


STAGES = (
    Stage("environment", "card, versions, and which kernel serves each operation", "environment", 10),
    Stage("offsets", "parameters, masters, moments and gradients begin on 128 bytes", "offsets", 15),
    Stage("agreement", "loss and all gradients of tiny models of both families: CUDA against CPU", "agreement", 20),
    Stage("tests", "the tests marked gpu", "tests", 35),
    Stage("debug_runs.vl", "vl_debug: 20 steps, checkpoint, resume on a CPU and back", "debug_runs", 40, "vl"),
    Stage("debug_runs.vl2", "vl2_debug: 20 steps, checkpoint, resume on a CPU and back", "debug_runs", 40, "vl2"),
    Stage("slices.vl_7b", "VL-7B at full width: speed, memory, kernels, waits", "slices", 45, "vl_7b"),
    Stage("slices.vl2_small", "VL2-Small at full width: the same", "slices", 40, "vl2_small"),
    Stage("peers", "transformers on the VL-7B slice", "peers", 35, "vl_7b", needs="slices.vl_7b"),
    Stage("slices.vl_1b", "VL-1.3B at full width: the same", "slices", 35, "vl_1b"),
    Stage("slices.vl2_tiny", "VL2-Tiny at full width: the same", "slices", 35, "vl2_tiny"),
    Stage("ceilings", "matrix products, copies and attention of these shapes alone", "ceilings", 15),
)

# The limit of a stage is this multiple of its share of the time left, but at least the second number in seconds.
_SLACK, _FLOOR_S = 2.5, 40.0
# Importing torch and DeepSpeed alone takes up to this long on a cold machine.
LEAST_S = 15.0


def select(names: Sequence[str] | None) -> tuple[Stage, ...]:
    """The stages of these names, or all; a name before the dot stands for all that begin with it.

    Raises:
        ValueError: a name belongs to no stage.
    """
    if names is None:
        return STAGES
    known = {stage.name for stage in STAGES} | {stage.name.partition(".")[0] for stage in STAGES}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"--only {' '.join(unknown)}: no such stage; choose from {', '.join(sorted(known))}")
    asked = {stage.name for stage in STAGES if {stage.name, stage.name.partition(".")[0]} & set(names)}
    needed = {stage.needs for stage in STAGES if stage.name in asked}
    return tuple(stage for stage in STAGES if stage.name in asked | needed)


def limit_s(stage: Stage, later: Sequence[Stage], left_s: float) -> float:
    """Seconds that `stage` may take, of the `left_s` that it shares with the stages after it."""
    share_s = left_s * stage.weight_s / (stage.weight_s + sum(each.weight_s for each in later))
    return min(left_s, max(_FLOOR_S, _SLACK * share_s))
