"""Bytes of a run's state for each parameter, and their peak in the optimizer's step, without activations.

The state is what a rank holds when the passes of a step are done: weights, gradients, masters and moments. All tensors
that exist are counted, whoever made them.
"""

import argparse
import gc
import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
from benchmarks.record import circumstances, heading, write_json
from torch import Tensor

from megavl.config.error import ConfigError
from megavl.config.load import load_run
from megavl.config.rules import check
from megavl.config.run import RunConfig
from megavl.parallel.agree import RunError
from megavl.rehearsal.packs import grid_of, made_up_step
from megavl.rehearsal.storages import Storages
from megavl.runtime.env import Env, LaunchError, process_group, read_env
from megavl.runtime.mesh import mesh_of
from megavl.runtime.replica import build_replica


def run(args: argparse.Namespace) -> None:
    """Print what the command line asks for; the first rank's numbers."""
    env = read_env()
    try:
        config = load_run(args.config, args.overrides)
        check(config, env.world)
    except ConfigError as error:
        sys.exit(f"error: {error}" if env.rank == 0 else 1)
    try:
        with process_group(env, timeout=timedelta(seconds=config.train.timeout_s)):
            found = {**circumstances(env.device), "world": env.world, **measure(config, env)}
    except LaunchError as error:
        sys.exit(f"error: {error}")
    except RunError as error:
        sys.exit(f"error: {error}" if env.rank == 0 else 1)
    if env.rank == 0:
        print("\n".join(page(found)))
        if args.json:
            write_json(args.json, found)


def tensor_bytes() -> int:
    """Bytes of the storages of all tensors of this process, gradients included."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if isinstance(each, Tensor) and each.layout == torch.strided]
    tensors += [each.grad for each in tensors if each.is_leaf and each.grad is not None]
    return sum({each.untyped_storage()._cdata: each.untyped_storage().nbytes() for each in tensors}.values())


def measure(config: RunConfig, env: Env) -> dict[str, Any]:
    """State after one step and the passes of a second one, and the peak in the update of the second, in JSON types."""
    mesh = mesh_of(config, env.world, env.device)
    batch = made_up_step(config, mesh, "text", 0, grid_of(config, None), documents=1)
    before = tensor_bytes()
    replica = build_replica(config, mesh, env)
    replica.step(batch, config.optim.lr)
    replica.pipeline.train(batch)
    state_bytes = tensor_bytes() - before
    with Storages() as storages:
        replica.engine.step()
    return {
        "model": config.model.name,
        "precision": config.train.precision,
        "zero": config.parallel.zero,
        "parameters": sum(parameter.numel() for parameter in replica.stages.parameters()),
        "state_bytes": state_bytes,
        "peak_bytes": state_bytes + storages.peak,
    }


def page(found: dict[str, Any]) -> Iterator[str]:
    """The result in Markdown."""
    yield heading(found)
    yield ""
    yield "| model | ranks | ZeRO | precision | parameters of a rank | state, bytes a parameter | peak in an update |"
    yield "|---|---|---|---|---|---|---|"
    each, most = (found[name] / found["parameters"] for name in ("state_bytes", "peak_bytes"))
    yield (
        f"| {found['model']} | {found['world']} | {found['zero']} | {found['precision']} | "
        f"{found['parameters'] / 1e6:,.1f} M | {each:.2f} | {most:.2f} |"
    )
