"""Training steps over a slow network: messages overlap with computation, or the rank waits for each."""

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any
from unittest import mock

import torch.distributed as dist
from benchmarks.clock import clock_of
from benchmarks.paired import Ratio, paired_ratio, take_turns
from benchmarks.record import circumstances, heading, write_json
from benchmarks.slow_network import Message, SlowNetwork
from benchmarks.step_time import timed_step

from megavl.config.error import ConfigError
from megavl.config.load import load_run
from megavl.config.rules import check
from megavl.config.run import RunConfig
from megavl.parallel.agree import gather
from megavl.rehearsal.packs import grid_of, made_up_step
from megavl.runtime.deepspeed import engine
from megavl.runtime.env import Env, LaunchError, process_group, read_env
from megavl.runtime.mesh import mesh_of
from megavl.runtime.replica import build_replica

OVERLAPPING, WAITING = "overlapping", "waiting"


@dataclass(frozen=True)
class Step:
    """One step of a rank.

    wall_s:    of the step
    sent_s:    sum of the times that asynchronous messages take
    waited_s:  how long the rank waited for the network to deliver them
    others_s:  the same for all other messages
    """

    wall_s: float
    sent_s: float
    waited_s: float
    others_s: float


def run(args: argparse.Namespace) -> None:
    """Time the steps that the command line asks for; the first rank prints the table."""
    env = read_env()
    try:
        config = load_run(args.config, args.overrides)
        check(config, env.world)
        if config.train.micro_batch != 1:
            raise ConfigError("this benchmark", ["train.micro_batch must be 1: a longer one is a longer data.seq_len"])
        if env.device.type != "cpu":
            raise ConfigError(
                "this benchmark", ["it delays the host, which a GPU does not wait for; set DS_ACCELERATOR=cpu"]
            )
        with process_group(env, timeout=timedelta(seconds=config.train.timeout_s)):
            found = benchmark(config, env, args)
    except (ConfigError, LaunchError) as error:
        sys.exit(f"error: {error}" if env.rank == 0 else 1)
    if env.rank == 0:
        print("\n".join(page(found)))
        if args.json:
            write_json(args.json, found)


def benchmark(config: RunConfig, env: Env, args: argparse.Namespace) -> dict[str, Any]:
    """Steps of text. Collective; every rank has the result."""
    buckets = mock.patch.object(engine, "least_elements", lambda ranks: args.bucket) if args.bucket else nullcontext()
    with buckets:
        replica = build_replica(config, mesh_of(config, env.world, env.device), env)
    batch = made_up_step(config, replica.mesh, "text", 0, grid_of(config, None))
    read = clock_of(env.device)

    def work(network: SlowNetwork, overlaps: bool) -> Callable[[int], Step]:
        def step(_: int) -> Step:
            network.overlaps = overlaps
            network.messages.clear()
            time = timed_step(replica, batch, read, dist.barrier)
            return summed(time.whole.wall_s, network.messages)

        return step

    with SlowNetwork(args.latency_ms / 1e3, args.gigabytes_per_s * 1e9) as network:
        works = {OVERLAPPING: work(network, True), WAITING: work(network, False)}
        take_turns(args.warmup, works)
        by_rank = gather(take_turns(args.steps, works), replica.mesh.control)
    steps = {
        name: [over_ranks(ranks) for ranks in zip(*(each[name] for each in by_rank), strict=True)] for name in works
    }
    ratio = paired_ratio(*([step.wall_s for step in steps[name]] for name in (WAITING, OVERLAPPING)))
    return {
        **circumstances(env.device),
        "world": env.world,
        "latency_ms": args.latency_ms,
        "gigabytes_per_s": args.gigabytes_per_s,
        "groups": len(replica.engine.basic_optimizer.param_groups),
        "steps": {name: [asdict(step) for step in each] for name, each in steps.items()},
        "waiting_over_overlapping": asdict(ratio),
    }


def summed(wall_s: float, messages: Sequence[Message]) -> Step:
    """The step of `wall_s` seconds that had these messages."""
    hidden = [message for message in messages if message.asynchronous]
    return Step(
        wall_s,
        sum(message.takes_s for message in hidden),
        sum(message.waited_s for message in hidden),
        sum(message.waited_s for message in messages if not message.asynchronous),
    )


def over_ranks(steps: Sequence[Step]) -> Step:
    """The longest wall clock, and the means of the rest."""
    means = [
        statistics.mean(values) for values in zip(*((s.sent_s, s.waited_s, s.others_s) for s in steps), strict=True)
    ]
    return Step(max(step.wall_s for step in steps), *means)


def page(found: dict[str, Any]) -> list[str]:
    """The result in Markdown."""
    rows = []
    for name, steps in found["steps"].items():
        wall, sent, waited, others = (
            statistics.median(step[key] for step in steps) for key in ("wall_s", "sent_s", "waited_s", "others_s")
        )
        hidden = f"{max(0.0, 1 - waited / sent):.0%}" if sent else ""
        rows.append(f"| {name} | {wall:.3f} | {sent:.3f} | {waited:.3f} | {hidden} | {others:.3f} |")
    return [
        heading(found),
        f"{found['world']} ranks, messages of {found['latency_ms']:g} ms and {found['gigabytes_per_s']:g} GB/s, "
        f"{found['groups']} optimizer groups",
        "",
        "| messages | step, s | asynchronous messages take, s | waited for them, s | hidden | waited for others, s |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
        f"waiting / overlapping, step time: {Ratio(**found['waiting_over_overlapping'])}",
    ]
