"""Training steps on made-up packs: tokens/s, MFU and memory of one setting, or of several that take turns."""

import argparse
import os
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from string import ascii_uppercase
from typing import Any

import torch.distributed as dist
from benchmarks.clock import Spent, clock_of
from benchmarks.paired import Ratio, paired_ratio, take_turns
from benchmarks.record import circumstances, heading, write_json
from benchmarks.skew import skew_routing
from benchmarks.step_time import StepTime, busy_share, over_ranks, timed_step

from megavl.batch import Kind, StepBatch
from megavl.config.error import ConfigError
from megavl.config.load import load_run
from megavl.config.rules import check
from megavl.config.run import RunConfig
from megavl.config.tiles import Grid
from megavl.parallel.agree import RunError, gather
from megavl.plan.cost import step_flops
from megavl.plan.split import split_model
from megavl.plan.timeline import equal_stages_bubble
from megavl.rehearsal.packs import grid_of, made_up_step
from megavl.runtime.env import Env, LaunchError, process_group, read_env
from megavl.runtime.mesh import mesh_of
from megavl.runtime.metrics import memory_bytes, peak
from megavl.runtime.replica import Replica, build_replica

KINDS: tuple[Kind, ...] = ("text", "multimodal")


@dataclass(frozen=True)
class Setting:
    """One configuration that is measured.

    name:      A for the first
    overrides: those that it has beyond the first's
    grid:      of the local tiles of each image
    """

    name: str
    overrides: tuple[str, ...]
    config: RunConfig
    grid: Grid


def run(args: argparse.Namespace) -> None:
    """Time the steps that the command line asks for; the first rank prints the tables."""
    env = read_env()
    if args.pin:
        pin(env)
    try:
        settings = read_settings(args, env.world)
    except ConfigError as error:
        sys.exit(f"error: {error}" if env.rank == 0 else 1)
    try:
        with process_group(env, timeout=timedelta(seconds=settings[0].config.train.timeout_s)):
            found = benchmark(settings, env, args)
    except LaunchError as error:
        sys.exit(f"error: {error}")
    except (ConfigError, RunError) as error:  # every rank has the same
        sys.exit(f"error: {error}" if env.rank == 0 else 1)
    if env.rank == 0:
        print("\n".join(page(found)))
        if args.json:
            write_json(args.json, found)


def pin(env: Env) -> None:
    """Keep this rank on a core of its own."""
    cores = sorted(os.sched_getaffinity(0))
    if env.local_rank >= len(cores):
        sys.exit(f"error: --pin: local rank {env.local_rank} has no core, there are {len(cores)}; start fewer ranks")
    os.sched_setaffinity(0, {cores[env.local_rank]})


def read_settings(args: argparse.Namespace, world: int) -> list[Setting]:
    """The setting of the recipe and its overrides, then one for each --vs.

    Raises:
        ConfigError: one of them cannot run on `world` ranks or is not for this benchmark.
    """
    settings = []
    if len(args.vs) >= len(ascii_uppercase):
        raise ConfigError("this benchmark", [f"--vs is given {len(args.vs)} times, at most {len(ascii_uppercase) - 1}"])
    for name, overrides in zip(ascii_uppercase, ["", *args.vs], strict=False):
        beyond = tuple(shlex.split(overrides))
        config = load_run(args.config, [*args.overrides, *beyond])
        check(config, world)
        if config.train.micro_batch != 1:
            raise ConfigError("this benchmark", ["train.micro_batch must be 1: a longer one is a longer data.seq_len"])
        if args.skew and config.model.decoder.moe is None:
            raise ConfigError("this benchmark", [f"--skew: {config.model.name} has no routed experts"])
        settings.append(Setting(name, beyond, config, grid_of(config, args.grid)))
    return settings


def benchmark(settings: Sequence[Setting], env: Env, args: argparse.Namespace) -> dict[str, Any]:
    """Measure all settings in turn, one kind of step after the other. Collective; every rank has the result."""
    replicas = {}
    for setting in settings:
        replica = build_replica(setting.config, mesh_of(setting.config, env.world, env.device), env)
        if args.skew:
            skew_routing(replica)
        replicas[setting.name] = replica
    peak_flops, origin = peak(env)
    found = {
        **circumstances(env.device),
        "world": env.world,
        "peak_flops": peak_flops,
        "peak_origin": origin,
        "documents_per_pack": args.documents,
        "skewed_routing": args.skew,
        "settings": [describe(setting, replicas[setting.name]) for setting in settings],
        "steps": [],
    }
    for kind in args.kind or KINDS:
        batches = {
            setting.name: made_up_step(
                setting.config, replicas[setting.name].mesh, kind, args.images, setting.grid, args.documents
            )
            for setting in settings
        }
        works = {name: step_work(replica, batches[name], env) for name, replica in replicas.items()}
        take_turns(args.warmup, works)
        mine = take_turns(args.steps, works)
        by_rank = gather(mine, replicas[settings[0].name].mesh.control)
        times = merge_ranks(by_rank)
        memory = memory_bytes(env.device)
        for setting in settings:
            row = step_row(setting, batches[setting.name], times[setting.name], peak_flops, env.world)
            speeds = speed_ratios(batches, times, setting.name, settings[0].name)
            found["steps"].append(
                {
                    **row,
                    "memory_bytes": memory,
                    "busiest_expert": busiest_expert(replicas[setting.name], batches[setting.name]),
                    "pipeline": pipeline_share(setting.config, env, [times[setting.name] for times in by_rank]),
                    "times_as_fast": speeds,
                }
            )
    return found


def describe(setting: Setting, replica: Replica) -> dict[str, Any]:
    """The setting in JSON types."""
    config = setting.config
    return {
        "name": setting.name,
        "overrides": list(setting.overrides),
        "model": config.model.name,
        "blocks": config.model.decoder.layers,
        "precision": config.train.precision,
        "implementations": list(replica.lines),
    }


def step_work(replica: Replica, batch: StepBatch, env: Env) -> Callable[[int], StepTime]:
    """One step of a replica as a work that takes turns."""
    read = clock_of(env.device)
    return lambda _: timed_step(replica, batch, read, dist.barrier)


def merge_ranks(by_rank: Sequence[dict[str, list[StepTime]]]) -> dict[str, list[StepTime]]:
    """Times of each setting over all ranks, round by round."""
    return {
        name: [over_ranks(ranks) for ranks in zip(*(times[name] for times in by_rank), strict=True)]
        for name in by_rank[0]
    }


def step_row(
    setting: Setting, batch: StepBatch, times: Sequence[StepTime], peak_flops: float, world: int
) -> dict[str, Any]:
    """What one setting did in one kind of step: medians of its rounds, and the rounds themselves."""
    wall_s = [time.whole.wall_s for time in times]
    median_s = statistics.median(wall_s)
    flops = step_flops(setting.config, **batch.counts)
    capacity = peak_flops * world * median_s
    return {
        "step": batch.kind,
        "setting": setting.name,
        "images": batch.images,
        "tiles": batch.tiles,
        "tokens": batch.tokens,
        "tokens_per_s": batch.tokens / median_s,
        "wall_s": {"median": median_s, "lowest": min(wall_s), "highest": max(wall_s)},
        "cpu_s": statistics.median(time.whole.cpu_s for time in times),
        "forward_backward": medians([time.forward_backward for time in times]),
        "engine_step": medians([time.engine_step for time in times]),
        "waiting": medians([time.waiting for time in times]),
        "flops_per_s_a_device": flops.model / world / median_s,
        "mfu": flops.model / capacity,
        "hardware_utilization": flops.hardware / capacity,
        "rounds": [{"wall_s": time.whole.wall_s, "cpu_s": time.whole.cpu_s} for time in times],
    }


def pipeline_share(config: RunConfig, env: Env, by_rank: Sequence[Sequence[StepTime]]) -> dict[str, Any] | None:
    """How much of the time of forward and backward passes the ranks were busy, beside what the schedule allows with
    equal stages, in JSON types. None without a pipeline, and on a GPU, where the host does not wait."""
    parallel = config.parallel
    if parallel.pipeline == 1 or env.device.type != "cpu":
        return None
    micro_batches = config.train.micro_batches(env.world // parallel.model)
    ideal = 1 - equal_stages_bubble(parallel, micro_batches)
    shares = [busy_share(rounds) for rounds in zip(*by_rank, strict=True)]
    return {
        "stages": [len(items) for items in split_model(config, env.world)],
        "micro_batches": micro_batches,
        "ideal": ideal,
        "busy": statistics.median(shares),
        "of_ideal": asdict(paired_ratio(shares, [ideal] * len(shares))),
    }


def busiest_expert(replica: Replica, batch: StepBatch) -> float | None:
    """Largest load of an expert over the mean of its layer, in one more step; None without experts. Collective."""
    load = replica.step(batch, replica.config.optim.lr).load if replica.config.model.decoder.moe else None
    return load and load.max_over_mean.max().item()


def medians(spent: Sequence[Spent]) -> dict[str, float]:
    """Median wall clock and processor time."""
    return {
        "wall_s": statistics.median(each.wall_s for each in spent),
        "cpu_s": statistics.median(each.cpu_s for each in spent),
    }


def speed_ratios(
    batches: dict[str, StepBatch], times: dict[str, list[StepTime]], name: str, first: str
) -> dict[str, dict[str, float] | None]:
    """Tokens a second of the setting `name` over those of `first`, by wall clock and by processor time."""
    found = {}
    for clock in ("wall_s", "cpu_s"):
        mine, theirs = (
            [batches[each].tokens / seconds if (seconds := getattr(time.whole, clock)) else 0.0 for time in times[each]]
            for each in (name, first)
        )
        ratio = paired_ratio(mine, theirs)
        found[clock] = ratio and asdict(ratio)
    return found


def page(found: dict[str, Any]) -> list[str]:
    """The result in Markdown."""
    settings, several = found["settings"], len(found["settings"]) > 1
    lines = [
        heading(found),
        f"{found['world']} ranks, {found['documents_per_pack']} documents a pack"
        + (", skewed routing" if found["skewed_routing"] else ""),
    ]
    for setting in settings:
        beyond = f", {' '.join(setting['overrides'])}" if setting["overrides"] else ""
        name = f"{setting['name']}: " if several else ""
        lines.append(f"{name}{setting['model']}, {setting['blocks']} blocks, {setting['precision']}{beyond}")
    lines.append(f"peak {found['peak_flops'] * found['world'] / 1e12:.3g} TFLOP/s: {found['peak_origin']}")
    lines += dict.fromkeys(line for setting in settings for line in setting["implementations"])
    lines += [
        f"{_label(row, several)}: the busiest expert has {row['busiest_expert']:.1f} times the mean load of its layer"
        for row in found["steps"]
        if row["busiest_expert"] is not None
    ]
    lines += ["", *speed_table(found["steps"], several), "", *parts_table(found["steps"], several)]
    piped = [row for row in found["steps"] if row["pipeline"] is not None]
    return [*lines, "", *pipeline_table(piped, several)] if piped else lines


def speed_table(rows: Sequence[dict[str, Any]], several: bool) -> list[str]:
    """Speed, MFU and memory. Memory is that of the process, with the replicas of all settings."""
    return [
        "| step | images | tiles | tokens/s | s (fastest to slowest) | TFLOP/s a device | MFU "
        "| with recomputation | memory, GiB |",
        "|---|---|---|---|---|---|---|---|---|",
        *(
            f"| {_label(row, several)} | {row['images']} | {row['tiles']} | {row['tokens_per_s']:,.0f} | "
            f"{row['wall_s']['median']:.3f} ({row['wall_s']['lowest']:.3f} to {row['wall_s']['highest']:.3f}) | "
            f"{row['flops_per_s_a_device'] / 1e12:.3g} | {row['mfu']:.1%} | {row['hardware_utilization']:.1%} | "
            f"{row['memory_bytes'] / 2**30:.1f} |"
            for row in rows
        ),
    ]


def parts_table(rows: Sequence[dict[str, Any]], several: bool) -> list[str]:
    """Wall clock / processor seconds of the parts; with several settings, speed over the first's, round by round."""
    against = " times as fast as A, wall | by CPU |" if several else ""
    return [
        f"| step, wall / CPU s | whole | forward + backward | engine.step | waiting |{against}",
        f"|---|---|---|---|---|{'---|---|' if several else ''}",
        *(
            f"| {_label(row, several)} | {row['wall_s']['median']:.3f} / {row['cpu_s']:.3f} | "
            + " | ".join(
                f"{row[part]['wall_s']:.3f} / {row[part]['cpu_s']:.3f}"
                for part in ("forward_backward", "engine_step", "waiting")
            )
            + " |"
            + "".join(f" {shown(row['times_as_fast'][clock])} |" for clock in ("wall_s", "cpu_s") if several)
            for row in rows
        ),
    ]


def pipeline_table(rows: Sequence[dict[str, Any]], several: bool) -> list[str]:
    """How busy the ranks were."""
    return [
        "| step | items on each stage | micro-batches | busy in forward and backward | with equal stages | of that |",
        "|---|---|---|---|---|---|",
        *(
            f"| {_label(row, several)} | {', '.join(map(str, row['pipeline']['stages']))} | "
            f"{row['pipeline']['micro_batches']} | {row['pipeline']['busy']:.1%} | {row['pipeline']['ideal']:.1%} | "
            f"{shown(row['pipeline']['of_ideal'])} |"
            for row in rows
        ),
    ]


def shown(ratio: dict[str, float] | None) -> str:
    """Median of a ratio with its range; nothing where there is none."""
    return "" if ratio is None else str(Ratio(**ratio))


def _label(row: dict[str, Any], several: bool) -> str:
    return f"{row['step']} {row['setting']}" if several else row["step"]
