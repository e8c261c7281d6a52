"""The training loop, from a configuration to the last checkpoint."""

import itertools
import math
import time
from collections.abc import Iterable
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from megavl.checkpoint.load import latest, load, load_weights, read_state
from megavl.checkpoint.save import save
from megavl.config.load import differences, dump_run
from megavl.config.run import RunConfig
from megavl.data.assemble import ImageShare
from megavl.data.loader import Loader
from megavl.data.sampler import Sampler
from megavl.ops.dispatch import choose
from megavl.parallel.groups import Mesh, TensorAxis
from megavl.parallel.topology import Topology
from megavl.runtime.adamw import choose_adamw
from megavl.runtime.bad_images import BadImages
from megavl.runtime.balance import Balance
from megavl.runtime.engine import build_engine
from megavl.runtime.env import Env
from megavl.runtime.health import RunError, together, together_with_remarks
from megavl.runtime.mesh import mesh_of
from megavl.runtime.metrics import Metrics
from megavl.runtime.optim import schedule_ratio, set_learning_rate
from megavl.runtime.pipeline import Pipeline, build_stages
from megavl.runtime.reading import announce, report
from megavl.runtime.state import fragments, set_optimizer_step


def train(config: RunConfig, env: Env) -> None:
    """Train from the newest checkpoint in the output directory, or from the start, to the last step. Collective.

    Raises RunError with the same message on every rank when the run cannot go on.
    """
    mesh = mesh_of(config, env.world, env.device)
    ops = choose(env.device)
    sampler = together(lambda: Sampler(config.data, config.model, config.train), mesh.control)

    stages = build_stages(config, mesh, ops, env.device)
    engine = build_engine(stages, config, mesh)
    pipeline = Pipeline(engine, stages, config, mesh, ops)
    checkpoints = Path(config.output_dir) / "checkpoints"
    state = resume(engine, stages, config, mesh, checkpoints)
    first_step = state["step"]
    repacked = sampler.resume(state.get("data", {})) if first_step else []

    if env.rank == 0:
        optimizer = choose_adamw(env.device, config.parallel.zero)
        _introduce(config, mesh.topology, (*ops.lines, optimizer.line), first_step)
        announce(sampler, first_step, repacked)
    balance = Balance(stages, config, mesh)
    metrics = Metrics(config, env)
    bad_images = BadImages(config, state.get("bad_images", 0), mesh.control)
    has_stem = any(stage.vlm.stem is not None for stage in stages)
    images = _images_of(mesh.tp) if has_stem else None
    pin_memory = env.device.type == "cuda"
    loader = Loader(sampler, mesh.dp.rank, mesh.dp.size, images, first_step, pin_memory)
    batches = iter(loader)
    try:
        for step in range(first_step, config.train.steps):
            started = time.perf_counter()
            batch, replaced = together_with_remarks(
                lambda: next(batches), lambda batch: batch.bad_images or None, mesh.control
            )
            bad_images.record(step, itertools.chain(*replaced))
            lr = config.optim.lr * schedule_ratio(config.optim.schedule, step, config.train.steps)
            set_learning_rate(engine.basic_optimizer, lr)
            loss = over_the_world(pipeline.run(batch), mesh)
            _refuse_infinite("loss", loss, step)
            engine.step()
            load = balance.step()
            grad_norm = float(engine.get_global_grad_norm())
            _refuse_infinite("gradient norm", grad_norm, step)
            metrics.record(batch, loss, grad_norm, lr, time.perf_counter() - started, load)
            if (step + 1) % config.checkpoint.every == 0 or step + 1 == config.train.steps:
                progress = {"data": sampler.position(step + 1), "bad_images": bad_images.count}
                saved = keep(engine, stages, config, mesh, checkpoints, step + 1, progress)
                if env.rank == 0:
                    print(f"checkpoint {saved}", flush=True)
                    report(sampler, step + 1, config.output_dir)
    finally:
        loader.close()
        metrics.close()


def resume(
    engine: deepspeed.DeepSpeedEngine, stages: nn.ModuleList, config: RunConfig, mesh: Mesh, checkpoints: Path
) -> dict:
    """Read the newest checkpoint, if there is one. Returns its state, of which `step` is the first one to run."""
    newest = latest(checkpoints)
    held = fragments(engine, stages, mesh.dp.rank)
    if newest is None:
        if config.checkpoint.init_from is not None:
            load_weights(config.checkpoint.init_from, held, config.model, mesh.control)
        return {"step": 0}
    state = read_state(newest)
    load(newest, held, config.model, mesh.control)
    set_optimizer_step(engine, state["optimizer_step"])
    if dist.get_rank() == 0:
        print(f"resumed from {newest}", *differences(state["config"], dump_run(config)), sep="\n  ", flush=True)
    return state


def keep(
    engine: deepspeed.DeepSpeedEngine,
    stages: nn.ModuleList,
    config: RunConfig,
    mesh: Mesh,
    checkpoints: Path,
    done: int,
    progress: dict,
) -> Path:
    """Write a checkpoint after `done` steps. Collective. With the step and the seed in the configuration the stream of
    data is known, and nothing else in a run is random. `progress` is what else a resumed run wants to know: the images
    that were replaced so far ("bad_images"), and, so that it need not find it anew, the sampler's position ("data")."""
    state = {"optimizer_step": done, "config": dump_run(config), **progress}
    held = fragments(engine, stages, mesh.dp.rank)
    return save(checkpoints, done, held, state, config.checkpoint.keep, mesh.control)


def _images_of(tp: TensorAxis) -> ImageShare:
    """What a rank with the stem decodes."""
    return ImageShare(tp.rank, tp.size) if tp.shares_images else ImageShare()


def _introduce(config: RunConfig, topology: Topology, lines: Iterable[str], first_step: int) -> None:
    parallel, train = config.parallel, config.train
    ranks = "1 rank" if topology.world == 1 else f"{topology.world} ranks"
    micro_batches = train.global_batch // (topology.dp * train.micro_batch)
    experts = f" (experts over {topology.ep}, {parallel.expert_width})" if config.model.decoder.moe else ""
    print(
        f"{config.model.name} on {ranks}: tensor {topology.tp}{' with sequence' * parallel.sequence}, "
        f"pipeline {topology.pp} x {parallel.virtual_stages} stages, data {topology.dp}{experts}, "
        f"ZeRO-{parallel.zero}, {train.precision}\n"
        f"a step: {train.global_batch} packs of {config.data.seq_len} tokens, {micro_batches} micro-batches a rank\n"
        + "\n".join(lines)
        + f"\nfrom step {first_step} to {train.steps}, output in {config.output_dir}"
        + ("; nothing is left to do: raise train.steps to go on" if first_step >= train.steps else ""),
        flush=True,
    )


def _refuse_infinite(what: str, value: float, step: int) -> None:
    """Every rank has the same value."""
    if not math.isfinite(value):
        raise RunError(
            f"the {what} of step {step + 1} is {value}: this run has diverged, and the weights in memory are lost; "
            "start again from the last checkpoint with a lower optim.lr, or look at the data of this step"
        )


def over_the_world(loss: torch.Tensor, mesh: Mesh) -> float:
    """Sum of the parts of the loss, of which every tensor rank has a copy."""
    loss = loss / mesh.tp.size
    dist.all_reduce(loss)
    return loss.item()
