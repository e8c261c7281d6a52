"""Training steps of a recipe on made-up packs: tokens/s, MFU, memory.

No data is read: a text step has packs of documents of equal length (four by default), a multimodal step also images in
each pack, all of one grid of tiles. TFLOP/s are the model's on each device, a token going through its own experts only.
MFU is their ratio to what the devices can do (megavl/plan/hardware.py; measured at start where it is not known). Times
are the median of the timed steps, with the fastest and the slowest beside it.
"""

import argparse
import platform
import statistics
import sys
import time
from datetime import date, timedelta

import torch
import torch.distributed as dist
from benchmarks.measure import command_line

from megavl import __version__
from megavl.batch import Batch, Kind, StepBatch, tile_share
from megavl.config.error import ConfigError
from megavl.config.load import load_run
from megavl.config.rules import check
from megavl.config.run import RunConfig
from megavl.config.tiles import Grid, Tiling
from megavl.config.tokens import IGNORE_INDEX
from megavl.parallel.groups import Mesh
from megavl.plan.cost import step_flops
from megavl.plan.schedule import rank_of
from megavl.runtime.env import Env, LaunchError, process_group, read_env
from megavl.runtime.mesh import mesh_of
from megavl.runtime.metrics import memory_bytes, peak
from megavl.runtime.replica import Replica, build_replica

DOCUMENTS = 4


def made_up_pack(config: RunConfig, images: int, grid: Grid, mesh: Mesh, documents: int = DOCUMENTS) -> Batch:
    """Random tokens in documents of equal length; the images begin the first documents, as many as each can hold."""
    model, seq_len = config.model, config.data.seq_len
    tiling = Tiling(model)
    placeholders = int(tiling.tokens[tiling.grids.index(grid)])
    length = seq_len // documents
    lengths = [length] * (documents - 1) + [seq_len - (documents - 1) * length]
    in_each = length // placeholders
    if images > in_each * documents:
        sys.exit(
            f"error: {images} images of {placeholders} tokens do not fit {documents} documents of {length}; take fewer "
            "--images, a smaller --grid or a longer data.seq_len"
        )
    tokens = torch.randint(0, min(model.image_token_id, model.decoder.vocab_size), (seq_len,))
    for image in range(images):
        start = image // in_each * length + image % in_each * placeholders
        tokens[start : start + placeholders] = model.image_token_id
    labels = tokens.roll(-1)
    labels[labels == model.image_token_id] = IGNORE_INDEX
    labels[torch.tensor(lengths).cumsum(0) - 1] = IGNORE_INDEX
    tiles = images * grid.tiles
    mine = len(tile_share(tiles, mesh.tp.rank, mesh.tp.size)) if mesh.tp.shares_images else tiles
    size = model.pixel_tower.image_size
    pixels = torch.randint(256, (max(1, mine) if images else 0, 3, size, size), dtype=torch.uint8)
    return Batch.of(
        tiling,
        tokens=tokens,
        labels=labels,
        lengths=lengths,
        packs=1,
        grids=(grid,) * images,
        pixels=pixels if mesh.pp.rank == rank_of(0, config.parallel) else None,
    )


def made_up_step(
    config: RunConfig, mesh: Mesh, kind: Kind, images: int, grid: Grid, documents: int = DOCUMENTS
) -> StepBatch:
    """A step whose micro-batches are one pack each, all alike."""
    images = images if kind == "multimodal" else 0
    torch.manual_seed(0)
    pack = made_up_pack(config, images, grid, mesh, documents)
    packs = config.train.global_batch
    return StepBatch(
        step=0,
        kind=kind,
        micro_batches=(pack,) * (packs // mesh.dp.size),
        supervised_tokens=packs * int((pack.labels != IGNORE_INDEX).sum()),
        tokens=packs * config.data.seq_len,
        images=packs * images,
        tiles=packs * pack.tiles,
        squared_tokens=packs * sum(length**2 for length in pack.lengths),
    )


def grid_of(config: RunConfig, asked: str | None) -> Grid:
    """The grid of local tiles that the command line asks for as ROWSxCOLUMNS, or the smallest that the model has.

    Raises ConfigError for one that its images cannot have.
    """
    grids = {f"{grid.rows}x{grid.columns}": grid for grid in Tiling(config.model).grids}
    if asked is None:
        return next(iter(grids.values()))
    if asked not in grids:
        raise ConfigError("this benchmark", [f"--grid {asked} is none of {config.model.name}'s: {', '.join(grids)}"])
    return grids[asked]


def step_times(replica: Replica, batch: StepBatch, warmup: int, steps: int) -> list[float]:
    """Seconds of each timed step, of the slowest rank."""
    times = []
    for _ in range(warmup + steps):
        dist.barrier()
        started = time.perf_counter()
        replica.step(batch, replica.config.optim.lr)
        dist.barrier()
        times.append(time.perf_counter() - started)
    return times[warmup:]


def run(args: argparse.Namespace) -> None:
    """Time the steps that the command line asks for; the first rank prints the table."""
    env = read_env()
    try:
        config = load_run(args.config, args.overrides)
        check(config, env.world)
        if config.train.micro_batch != 1:
            raise ConfigError("this benchmark", ["train.micro_batch must be 1: a longer one is a longer data.seq_len"])
        grid = grid_of(config, args.grid)
    except ConfigError as error:
        sys.exit(f"error: {error}" if env.rank == 0 else 1)
    try:
        with process_group(env, timeout=timedelta(seconds=config.train.timeout_s)):
            benchmark(config, env, args, grid)
    except LaunchError as error:
        sys.exit(f"error: {error}")


def benchmark(config: RunConfig, env: Env, args: argparse.Namespace, grid: Grid) -> None:
    mesh = mesh_of(config, env.world, env.device)
    replica = build_replica(config, mesh, env)
    peak_flops, origin = peak(env)
    rows = []
    for kind in ("text", "multimodal"):
        batch = made_up_step(config, mesh, kind, args.images, grid, args.documents)
        times = step_times(replica, batch, args.warmup, args.steps)
        flops = step_flops(config, **batch.counts)
        median = statistics.median(times)
        capacity = peak_flops * env.world * median
        rows.append(
            f"| {kind} | {batch.images} | {batch.tiles} | {batch.tokens / median:,.0f} | {median:.3f} "
            f"({min(times):.3f} to {max(times):.3f}) | {flops.model / env.world / median / 1e12:.3g} | "
            f"{flops.model / capacity:.1%} | {flops.hardware / capacity:.1%} | "
            f"{memory_bytes(env.device) / 2**30:.1f} |"
        )
    if env.rank == 0:
        device = torch.cuda.get_device_name(env.device) if env.device.type == "cuda" else platform.processor() or "CPU"
        print(f"{date.today()}, {env.world} x {device}, megavl {__version__}, torch {torch.__version__}")
        print(
            f"{config.model.name}, {config.model.decoder.layers} blocks, {config.train.precision}: `{command_line()}`"
        )
        print(f"peak {peak_flops * env.world / 1e12:.3g} TFLOP/s: {origin}")
        print(*replica.lines, sep="\n")
        print(
            "\n| step | images | tiles | tokens/s | s (fastest to slowest) | TFLOP/s a device | MFU "
            "| with recomputation | memory, GiB |"
        )
        print("|---|---|---|---|---|---|---|---|---|", *rows, sep="\n")
