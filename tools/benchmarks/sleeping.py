"""Pipelines of more ranks than the machine has cores: passes sleep for as long as the plan of a recipe says they take.

Schedule, messages, encoding of images before the passes and the engine are those of a run. A stage is one item of a
small model, whose own computation hardly counts beside the sleep: it sleeps for all items that the recipe's stage has.
The tensor axis is only in the durations.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from benchmarks.clock import clock_of
from benchmarks.paired import Ratio, paired_ratio, take_turns
from benchmarks.record import circumstances, heading, write_json
from benchmarks.step_time import StepTime, busy_share, timed_step
from torch import Tensor
from torch.autograd import Function
from torch.nn import Module
from torch.nn.modules.module import register_module_forward_hook

from megavl.batch import Kind, StepBatch
from megavl.config.error import ConfigError
from megavl.config.load import load_run
from megavl.config.presets import PRESETS
from megavl.config.run import RunConfig
from megavl.model.encoder import TileEncoder
from megavl.parallel.agree import gather
from megavl.plan.expected_work import ExpectedWork, expected_work, step_timeline
from megavl.plan.mix import expected_steps
from megavl.plan.schedule import stages_of
from megavl.plan.split import split_model
from megavl.plan.timeline import equal_stages_bubble
from megavl.rehearsal.packs import grid_of, made_up_step
from megavl.runtime.env import Env, LaunchError, process_group, read_env
from megavl.runtime.mesh import mesh_of
from megavl.runtime.replica import Replica, build_replica
from megavl.runtime.stage import Stage

# Name, where the images are encoded, and `parallel.stages`.
SETTINGS = (
    ("equal numbers of items, replicated", "replicated", None),
    ("balanced stages, replicated", "replicated", "auto"),
    ("balanced stages, sharded", "sharded", "auto"),
    ("balanced stages, pipelined", "pipelined", "auto"),
)
KINDS: tuple[Kind, ...] = ("text", "multimodal")
_SEQ_LEN = 256  # holds the images of a pack, each of 16 tokens or more


@dataclass(frozen=True)
class Setting:
    """A recipe with one split and one place of the vision encoder.

    planned: the recipe itself
    small:   what runs
    stages:  items of the model list on each stage, as planned
    """

    name: str
    planned: RunConfig
    small: RunConfig
    stages: tuple[range, ...]


def run(args: argparse.Namespace) -> None:
    """Time the steps that the command line asks for; the first rank prints the table."""
    env = read_env()
    try:
        settings = list(_settings(args, env.world))
    except ConfigError as error:
        sys.exit(f"error: {error}" if env.rank == 0 else 1)
    try:
        with process_group(env, timeout=timedelta(minutes=10)):
            found = benchmark(settings, env, args)
    except LaunchError as error:
        sys.exit(f"error: {error}")
    if env.rank == 0:
        print("\n".join(page(found)))
        if args.json:
            write_json(args.json, found)


def _settings(args: argparse.Namespace, ranks: int) -> Iterator[Setting]:
    """Those of `SETTINGS` that the recipe allows on a pipeline of `ranks` ranks and one data-parallel rank."""
    for name, vision, stages in SETTINGS:
        config = load_run(args.config, [*args.overrides, f"parallel.vision={vision}"])
        parallel = config.parallel.model_copy(update={"pipeline": ranks, "stages": stages, "expert": 1})
        train = config.train.model_copy(update={"global_batch": args.micro_batches, "micro_batch": 1})
        planned = config.model_copy(update={"parallel": parallel, "train": train})
        if stages is None and config.model.layers % parallel.num_stages:
            continue
        if vision == "sharded" and parallel.tensor == 1:
            continue
        yield Setting(name, planned, _small(planned), split_model(planned, parallel.model))


def _small(planned: RunConfig) -> RunConfig:
    """A small model of the same family with as many items as stages (at least three), on one tensor rank."""
    model, count = PRESETS["vl_debug" if planned.model.tiling is None else "vl2_debug"], planned.parallel.num_stages
    layers = max(1, count - 2)
    decoder = model.decoder.model_copy(update={"layers": layers})
    vision = "pipelined" if planned.parallel.vision == "pipelined" else "replicated"
    stages = (*[1] * (count - 1), layers + 3 - count)
    sizes = {"tensor": 1, "sequence": False, "zero": 1, "vision": vision, "stages": stages}
    return planned.model_copy(
        update={
            "model": model.model_copy(update={"decoder": decoder}),
            "parallel": planned.parallel.model_copy(update=sizes),
            "data": planned.data.model_copy(update={"seq_len": _SEQ_LEN}),
            "train": planned.train.model_copy(update={"precision": "fp32", "recompute": "off"}),
        }
    )


class _Sleep(Function):
    """The identity, which takes `forward_s` forward and `backward_s` backward."""

    @staticmethod
    def forward(ctx, x: Tensor, forward_s: float, backward_s: float) -> Tensor:
        ctx.backward_s = backward_s
        time.sleep(forward_s)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        time.sleep(ctx.backward_s)
        return grad, None, None


@dataclass(frozen=True)
class Durations:
    """Seconds of the passes of one kind of step.

    stages: forward and backward pass of each stage
    tile:   the same of a tile that is encoded before the passes
    """

    stages: tuple[tuple[float, float], ...]
    tile: tuple[float, float]


def durations(setting: Setting, work: ExpectedWork, scale: float) -> Durations:
    """At `scale` seconds a FLOP."""
    train, parallel = setting.planned.train, setting.planned.parallel
    (step,) = (each for each in expected_steps(setting.planned) if each.name == work.name)
    # `work.towers` is the share of a rank in a micro-batch, and the ranks share all tiles of the step.
    towers = scale * parallel.pipeline * train.global_batch / max(1, step.tiles)
    stages = map(work.passes, setting.stages)
    return Durations(
        tuple((scale * passes.forward, scale * passes.backward) for passes in stages),
        (towers * work.towers.forward, towers * work.towers.backward),
    )


@contextmanager
def sleeping(replica: Replica, each: Durations) -> Iterator[None]:
    """While entered, stages, and the encoder ahead of the passes, sleep after their own computation."""
    parallel, rank = replica.config.parallel, replica.mesh.pp.rank
    of_stage = dict(zip(replica.stages, (each.stages[index] for index in stages_of(rank, parallel)), strict=True))

    def sleep(module: Module, inputs: tuple[Any, ...], output: Any) -> Tensor | None:
        if isinstance(module, Stage):
            return _Sleep.apply(output, *of_stage[module])
        if isinstance(module, TileEncoder):
            forward_s, backward_s = each.tile
            return _Sleep.apply(output, len(inputs[0]) * forward_s, len(inputs[0]) * backward_s)
        return None

    hook = register_module_forward_hook(sleep)
    try:
        yield
    finally:
        hook.remove()


def predicted_s(setting: Setting, work: ExpectedWork, scale: float) -> float:
    """Time of forward and backward passes, simulated without time for messages."""
    micro_batches = setting.planned.train.global_batch
    stages = step_timeline(setting.planned.parallel, setting.stages, work, micro_batches).seconds
    return scale * (stages + micro_batches * work.towers.both)


def benchmark(settings: Sequence[Setting], env: Env, args: argparse.Namespace) -> dict[str, Any]:
    """Measure all settings in turn. Collective; every rank has the result."""
    text, _ = expected_work(settings[0].planned)
    scale = args.stage_s * settings[0].planned.parallel.num_stages / sum(item.both for item in text.items)
    works, planned, replicas = {}, {}, {}
    for setting in settings:
        replica = build_replica(setting.small, mesh_of(setting.small, env.world, env.device), env)
        replicas[setting.name] = replica
        for step, work in zip(expected_steps(setting.planned), expected_work(setting.planned), strict=True):
            grid = grid_of(setting.small, None)
            batch = made_up_step(setting.small, replica.mesh, step.name, step.images, grid, documents=1)
            works[setting.name, step.name] = _work(replica, batch, durations(setting, work, scale), env)
            planned[setting.name, step.name] = predicted_s(setting, work, scale)
    take_turns(1, works)
    by_rank = gather(take_turns(args.steps, works), replicas[settings[0].name].mesh.control)
    times = {
        key: [max(time.forward_backward.wall_s for time in ranks) for ranks in _rounds(by_rank, key)] for key in works
    }
    rows = []
    for setting in settings:
        text_s, multimodal_s = (times[setting.name, kind] for kind in KINDS)
        rows.append(
            {
                "setting": setting.name,
                "stages": list(map(len, setting.stages)),
                "seconds": {kind: statistics.median(times[setting.name, kind]) for kind in KINDS},
                "predicted_s": {kind: planned[setting.name, kind] for kind in KINDS},
                "busy": {
                    kind: statistics.median(map(busy_share, _rounds(by_rank, (setting.name, kind)))) for kind in KINDS
                },
                "of_text": asdict(paired_ratio(text_s, multimodal_s)),
            }
        )
    return {
        **circumstances(env.device),
        "model": settings[0].planned.model.name,
        "ranks": env.world,
        "micro_batches": args.micro_batches,
        "equal_stages_busy": 1 - equal_stages_bubble(settings[0].planned.parallel, args.micro_batches),
        "rows": rows,
    }


def _rounds(by_rank: Sequence[dict[Any, list[StepTime]]], key: Any) -> Iterator[tuple[StepTime, ...]]:
    """Times of all ranks, round by round."""
    return zip(*(times[key] for times in by_rank), strict=True)


def _work(replica: Replica, batch: StepBatch, each: Durations, env: Env) -> Callable[[int], StepTime]:
    """One step as a work that takes turns."""
    read = clock_of(env.device)

    def work(_: int) -> StepTime:
        with sleeping(replica, each):
            return timed_step(replica, batch, read, dist.barrier)

    return work


def page(found: dict[str, Any]) -> list[str]:
    """The result in Markdown."""
    return [
        heading(found),
        f"{found['model']}, {found['ranks']} pipeline ranks, {found['micro_batches']} micro-batches. Seconds are those "
        "of forward and backward passes, measured / predicted; a rank is busy while it does not wait for messages; "
        f"with stages that take equally long it is {found['equal_stages_busy']:.1%} of the time. The last column is "
        "the rate of a multimodal step over that of a text step in the same round.",
        "",
        "| stages, images | text, s | multimodal, s | busy, text | busy, multimodal | multimodal / text |",
        "|---|---|---|---|---|---|",
        *(
            f"| {row['setting']} | "
            + " | ".join(f"{row['seconds'][kind]:.2f} / {row['predicted_s'][kind]:.2f}" for kind in KINDS)
            + " | "
            + " | ".join(f"{row['busy'][kind]:.1%}" for kind in KINDS)
            + f" | {Ratio(**row['of_text'])} |"
            for row in found["rows"]
        ),
    ]
