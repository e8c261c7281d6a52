"""The training loop, from a configuration to the last checkpoint."""

import itertools
import time
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path

from megavl.config.load import differences, dump_run
from megavl.config.run import RunConfig
from megavl.data.assemble import ImageShare
from megavl.data.loader import Loader
from megavl.data.sampler import Sampler
from megavl.data.worker import preload_workers
from megavl.parallel.agree import on_every_rank, on_every_rank_with_notes, on_first_rank
from megavl.parallel.groups import TensorAxis
from megavl.parallel.topology import Topology
from megavl.runtime.bad_images import BadImages
from megavl.runtime.env import Env
from megavl.runtime.mesh import mesh_of
from megavl.runtime.metrics import Metrics
from megavl.runtime.optim import schedule_ratio
from megavl.runtime.origin import find_origin
from megavl.runtime.reading import announce, report
from megavl.runtime.replica import build_replica
from megavl.runtime.vision import encoder_group


def train(config: RunConfig, env: Env) -> None:
    """Train from the newest checkpoint in the output directory, or from the start, to the last step. Collective.

    Raises RunError with the same message on every rank when the run cannot go on.
    """
    preload_workers()
    mesh = mesh_of(config, env.world, env.device)
    sampler = on_every_rank(lambda: Sampler(config.data, config.model, config.train), mesh.control)
    checkpoints = Path(config.output_dir) / "checkpoints"
    origin = find_origin(config, checkpoints, mesh.control)
    replica = build_replica(config, mesh, env, origin.initialise)
    state = replica.resume(origin)
    first_step = state["step"]
    repacked = sampler.resume(state.get("data", {})) if first_step else []

    def introduce() -> None:
        if first_step:
            changes = differences(state["config"], dump_run(config))
            print(f"resumed from {state['path']}", *changes, sep="\n  ", flush=True)
        _introduce(config, mesh.topology, replica.lines, first_step)
        announce(sampler, first_step, repacked)

    on_first_rank(introduce, mesh.control)
    metrics = Metrics(config, env, mesh.control)
    bad_images = BadImages(config, state.get("bad_images", 0), mesh.control)
    encodes_ahead = config.parallel.encodes_ahead
    images = _images_of(mesh.tp) if replica.has_stem and not encodes_ahead else None
    ahead = encoder_group(config, mesh).share if encodes_ahead else None
    pin_memory = env.device.type == "cuda"
    loader = Loader(sampler, mesh.dp.rank, mesh.dp.size, images, first_step, pin_memory, ahead)
    batches = iter(loader)
    try:
        for step in range(first_step, config.train.steps):
            started = time.perf_counter()
            batch, replaced = on_every_rank_with_notes(
                lambda: next(batches), lambda batch: batch.bad_images or None, mesh.control
            )
            bad_images.record(step, itertools.chain(*replaced))
            lr = config.optim.lr * schedule_ratio(config.optim.schedule, step, config.train.steps)
            done = replica.step(batch, lr)
            metrics.record(batch, done.loss, done.grad_norm, lr, time.perf_counter() - started, done.load)
            if (step + 1) % config.checkpoint.every == 0 or step + 1 == config.train.steps:
                position = on_every_rank(partial(sampler.position, step + 1), mesh.control)
                progress = {"data": position, "bad_images": bad_images.count}
                saved = replica.save(checkpoints, step + 1, progress)
                on_first_rank(partial(_report_saved, saved, sampler, step + 1, config.output_dir), mesh.control)
        on_first_rank(metrics.close, mesh.control)
    except BaseException:
        # Files that cannot be written must not hide what ended the run.
        with suppress(Exception):
            metrics.close()
        raise
    finally:
        loader.close()


def _report_saved(path: Path, sampler: Sampler, done: int, output_dir: str) -> None:
    print(f"checkpoint {path}", flush=True)
    report(sampler, done, output_dir)


def _images_of(tp: TensorAxis) -> ImageShare:
    """What a rank with the stem decodes."""
    return ImageShare(tp.rank, tp.size) if tp.shares_images else ImageShare()


def _introduce(config: RunConfig, topology: Topology, lines: Iterable[str], first_step: int) -> None:
    parallel, train = config.parallel, config.train
    ranks = "1 rank" if topology.world == 1 else f"{topology.world} ranks"
    experts = f" (experts over {topology.ep}, {parallel.expert_width})" if config.model.decoder.moe else ""
    print(
        f"{config.model.name} on {ranks}: tensor {topology.tp}{' with sequence' * parallel.sequence}, "
        f"pipeline {topology.pp} x {parallel.virtual_stages} stages, data {topology.dp}{experts}, "
        f"ZeRO-{parallel.zero}, {train.precision}\n"
        f"a step: {train.global_batch} packs of {config.data.seq_len} tokens, "
        f"{train.micro_batches(topology.dp)} micro-batches a rank\n"
        + "\n".join(lines)
        + f"\nfrom step {first_step} to {train.steps}, output in {config.output_dir}"
        + ("; nothing is left to do: raise train.steps to go on" if first_step >= train.steps else ""),
        flush=True,
    )
