"""A tiny run, its steps made by hand, and what a rank of any topology sees of it."""

from math import prod
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megavl.batch import Batch, StepBatch, tile_share
from megavl.config.model import DecoderConfig, ModelConfig, SamConfig, SiglipConfig
from megavl.config.rules import check
from megavl.config.run import DataConfig, OptimConfig, ParallelConfig, RunConfig, SourceConfig, TrainConfig
from megavl.config.tiles import Grid
from megavl.ops.dispatch import choose
from megavl.parallel.cross_entropy import IGNORED
from megavl.parallel.groups import Mesh
from megavl.runtime.engine import build_engine
from megavl.runtime.env import start_deepspeed
from megavl.runtime.loop import keep, over_the_world, resume
from megavl.runtime.mesh import mesh_of
from megavl.runtime.optim import set_learning_rate
from megavl.runtime.pipeline import Pipeline, build_stages
from megavl.runtime.state import fragments

SEQ_LEN, GLOBAL_BATCH, STEPS = 48, 12, 5
IMAGE = 95
# Every part of the 7B: windowed (padded) and global SAM attention, both necks, SigLIP, hybrid adaptor. 12 items in the
# model list and 12 heads: they divide by 2, 3, 4 and 6.
MODEL = ModelConfig(
    name="tiny",
    siglip=SiglipConfig(image_size=16, patch_size=8, width=24, layers=2, heads=4, mlp_width=32),
    sam=SamConfig(
        image_size=32,
        patch_size=8,
        width=16,
        layers=2,
        heads=2,
        mlp_width=32,
        window=3,
        global_layers=(1,),
        neck_width=4,
    ),
    decoder=DecoderConfig(layers=10, width=48, heads=12, kv_heads=12, mlp_width=72, vocab_size=96),
    image_token_id=IMAGE,
    init_std=0.05,
)
# Images in each pack of a multimodal step: many, few and none, so that whole micro-batches and ranks have none.
IMAGES = (3, 0, 1, 0, 0, 2, 0, 0, 0, 5, 1, 0)


def run_config(
    world: int = 1, *, optim: dict | None = None, train: dict | None = None, parallel: dict | None = None
) -> RunConfig:
    """The tiny run, checked for `world` ranks."""
    config = RunConfig(
        output_dir="unused",
        model=MODEL,
        parallel=ParallelConfig(**(parallel or {})),
        data=DataConfig(
            tokenizer="unused",
            text=(SourceConfig(prefix="unused"),),
            multimodal=(SourceConfig(prefix="unused"),),
            text_ratio=0.5,
            seq_len=SEQ_LEN,
        ),
        optim=OptimConfig(**{"lr": 1e-2, "eps": 1e-4, "grad_clip": 0.5, "weight_decay": 0.1} | (optim or {})),
        train=TrainConfig(**{"steps": STEPS, "global_batch": GLOBAL_BATCH, "precision": "fp32"} | (train or {})),
    )
    check(config, world)
    return config


def _pack(step: int, number: int, images: int) -> tuple[Tensor, Tensor, list[int]]:
    """Tokens, labels [T] and document lengths of one pack: up to three documents and padding."""
    generator = torch.Generator().manual_seed(1000 * step + number)
    tokens = torch.randint(0, 90, (SEQ_LEN,), generator=generator)
    lengths = [SEQ_LEN - 22 - number % 3, 22, number % 3] if number % 3 else [SEQ_LEN]
    # Images side by side at the start of the pack, inside its first document.
    tokens[: MODEL.tile_features * images] = IMAGE
    labels = tokens.roll(-1)
    labels[labels == IMAGE] = IGNORED
    for border in torch.tensor(lengths).cumsum(0).tolist():
        labels[border - 1] = IGNORED
    if number % 3:
        labels[SEQ_LEN - number % 3 :] = IGNORED  # the last document is padding
    return tokens, labels, lengths


def _micro_batch(step: int, numbers: list[int], multimodal: bool, mesh: Mesh) -> Batch:
    packs = [_pack(step, number, IMAGES[number] * multimodal) for number in numbers]
    lengths = [length for pack in packs for length in pack[2]]
    pixels = [
        torch.randn((3, 32, 32), generator=torch.Generator().manual_seed(7 * step + 100 * number + image))
        for number in numbers
        for image in range(IMAGES[number] * multimodal)
    ]
    high = torch.stack(pixels) if pixels else torch.zeros(0, 3, 32, 32)  # [I, 3, 32, 32]
    if mesh.tp.shares_images:
        mine = tile_share(len(high), mesh.tp.rank, mesh.tp.size)
        high = high[mine.start : mine.stop]
    return Batch(
        tokens=torch.cat([pack[0] for pack in packs]),
        labels=torch.cat([pack[1] for pack in packs]),
        positions=torch.cat([torch.arange(length) for length in lengths]),
        cu_seqlens=torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32),
        packs=len(packs),
        grids=(Grid(0, 0),) * len(pixels),
        pixels={"sam": high, "siglip": high[:, :, ::2, ::2]} if mesh.pp.rank == 0 else None,
    )


def step_batch(step: int, config: RunConfig, mesh: Mesh) -> StepBatch:
    """This rank's part of a global batch that does not depend on the topology. Steps 1 and 3 are text."""
    multimodal = step % 2 == 0
    share = GLOBAL_BATCH // mesh.dp.size
    numbers = list(range(GLOBAL_BATCH))[mesh.dp.rank * share : (mesh.dp.rank + 1) * share]
    size = config.train.micro_batch
    supervised = sum(
        (_pack(step, number, IMAGES[number] * multimodal)[1] != IGNORED).sum().item() for number in range(GLOBAL_BATCH)
    )
    return StepBatch(
        step=step,
        kind="multimodal" if multimodal else "text",
        micro_batches=tuple(
            _micro_batch(step, numbers[first : first + size], multimodal, mesh) for first in range(0, share, size)
        ),
        supervised_tokens=supervised,
        tokens=GLOBAL_BATCH * SEQ_LEN,
        images=sum(IMAGES) * multimodal,
        tiles=sum(IMAGES) * multimodal,
        squared_tokens=0,
    )


def set_up(config: RunConfig):
    """(mesh, stages, engine, pipeline) of this rank. Collective."""
    start_deepspeed("gloo")
    mesh = mesh_of(config.parallel, dist.get_world_size())
    cpu = torch.device("cpu")
    ops = choose(cpu)
    stages = build_stages(config, mesh, ops, cpu)
    # The SAM branch counts from the start: its scale begins at zero, which would hide it.
    for stage in stages:
        for name, parameter in stage.vlm.named_parameters():
            if name.endswith("hd_alpha_downsamples"):
                parameter.data.fill_(0.7)
    engine = build_engine(stages, config, mesh)
    return mesh, stages, engine, Pipeline(engine, stages, config, mesh, ops)


def train(config: RunConfig, checkpoints: str | None = None) -> tuple[list[tuple[float, float]], dict[str, Tensor]]:
    """(loss, gradient norm) of each step, and this rank's parameters after the last one, in their place in full tensors
    of which the rest is NaN. With `checkpoints`, begins at the newest one there and leaves one behind."""
    mesh, stages, engine, pipeline = set_up(config)
    first = resume(engine, stages, config, mesh, Path(checkpoints))["step"] if checkpoints else 0
    history = []
    for step in range(first, config.train.steps):
        set_learning_rate(engine.basic_optimizer, config.optim.lr)
        loss = over_the_world(pipeline.run(step_batch(step, config, mesh)), mesh)
        engine.step()
        history.append((loss, float(engine.get_global_grad_norm())))
    if checkpoints:
        keep(engine, stages, config, mesh, Path(checkpoints), config.train.steps, progress={})
    return history, weights(engine, stages, mesh)


def initial_weights(config: RunConfig) -> dict[str, Tensor]:
    """Parameters before the first step."""
    mesh, stages, engine, _ = set_up(config)
    return weights(engine, stages, mesh)


def weights(engine, stages, mesh: Mesh) -> dict[str, Tensor]:
    """What this rank holds of each parameter, NaN elsewhere."""
    found = {}
    for held in fragments(engine, stages, mesh.dp.rank):
        if held.kind == "param":
            local = torch.full((prod(held.shape),), float("nan"))
            local[held.start : held.start + len(held.values)] = held.values.float()
            full = torch.full(held.full_shape, float("nan"))
            box = tuple(slice(first, first + size) for first, size in zip(held.offsets, held.shape, strict=True))
            full[box] = local.view(held.shape)
            found[held.name] = full
    return found


def merge(by_rank: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Full parameters from the parts of all ranks."""
    merged: dict[str, Tensor] = {}
    for part in by_rank:
        for name, tensor in part.items():
            merged[name] = torch.where(tensor.isnan(), merged.get(name, tensor), tensor)
    assert not any(tensor.isnan().any() for tensor in merged.values()), "some element is on no rank"
    return merged
