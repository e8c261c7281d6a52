"""Tiny runs of both families, their steps made by hand, and what a rank of any topology sees of them."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from megavl.batch import Batch, StepBatch, TilesAhead, tile_share
from megavl.checkpoint.fragments import Kind
from megavl.checkpoint.load import load_weights
from megavl.config.model import ModelConfig
from megavl.config.rules import check
from megavl.config.run import RunConfig
from megavl.config.tiles import Grid, Tiling
from megavl.config.tokens import IGNORE_INDEX
from megavl.model.init import initialise
from megavl.ops.dispatch import Ops, choose
from megavl.parallel.groups import Mesh
from megavl.runtime.balance import Load
from megavl.runtime.deepspeed import engine
from megavl.runtime.deepspeed.start import start_deepspeed
from megavl.runtime.mesh import mesh_of
from megavl.runtime.origin import find_origin
from megavl.runtime.replica import Replica
from megavl.runtime.stage import Initialise, build_stages
from megavl.runtime.vision import encoder_group
from tests.config.runs import make_run
from tests.models import HYBRID, MHA_SOFTMAX, MLA_SIGMOID, MLA_SOFTMAX, changed

CPU = torch.device("cpu")
RECIPES = sorted((Path(__file__).parents[2] / "launch" / "recipes").glob("*.yaml"))
SEQ_LEN, GLOBAL_BATCH, STEPS = 48, 12, 5
# What errors of rounding grow to in five steps depends on every width. With these they stay far below the bounds of
# test_topologies and test_resume (docs/parallelism.md has them); with those of tests.models the gradient norm of a case
# in bf16 was 9e-2 off, and one in fp32 1.1e-5.
_DECODER = {"width": 48, "mlp_width": 72, "vocab_size": 96}
_TOKENS = {"image_token_id": 90, "init_std": 0.05}
# 12 items in the model list and 12 heads: topologies divide them by 2, 3, 4 and 6. 4 tokens an image, for packs with 5
# of them. In the pixels of `_micro_batch` a grid of 4, of which windows of 3 are padded, and one block of each kind.
MODEL = changed(
    HYBRID,
    siglip={"patch_size": 8, "heads": 4, "mlp_width": 32},
    sam={
        "image_size": 32,
        "patch_size": 8,
        "window": 3,
        "layers": 2,
        "global_layers": (1,),
        "width": 16,
        "heads": 2,
        "mlp_width": 32,
        "neck_width": 4,
    },
    decoder=_DECODER | {"layers": 10, "heads": 12, "kv_heads": 12},
    **_TOKENS,
)


def _vl2(model: ModelConfig, **decoder) -> ModelConfig:
    """6 items in the model list and 8 experts: topologies divide them by 2 and 4."""
    moe = {"experts": 8, "per_token": 3, "width": 16}
    return changed(
        model,
        siglip={"width": 24, "layers": 1, "mlp_width": 32, "gelu_approximation": "none"},
        decoder=_DECODER | {"layers": 4, "moe": moe} | decoder,
        **_TOKENS,
    )


_MLA = {"kv_rank": 16, "nope_width": 8, "rope_width": 4}
# The decoders of Tiny, Small and Base.
VL2 = {"tiny": _vl2(MHA_SOFTMAX), "small": _vl2(MLA_SOFTMAX, mla=_MLA), "base": _vl2(MLA_SIGMOID, mla=_MLA)}
# The grids of the images in the packs of a multimodal step: many, few and none, so that whole micro-batches and ranks
# have none.
GRIDS = {
    "vl": {pack: (Grid(0, 0),) * images for pack, images in {0: 3, 2: 1, 5: 2, 9: 5, 10: 1}.items()},
    "vl2": {
        0: (Grid(1, 1), Grid(1, 2), Grid(1, 1)),
        2: (Grid(2, 1),),
        5: (Grid(1, 3),),
        9: (Grid(2, 1), Grid(1, 3)),
        10: (Grid(1, 1),),
    },
}


def run_config(
    world: int = 1,
    *,
    model: ModelConfig = MODEL,
    optim: dict | None = None,
    train: dict | None = None,
    parallel: dict | None = None,
    balance: dict | None = None,
    ops: dict | None = None,
) -> RunConfig:
    """The tiny run, checked for `world` ranks."""
    config = make_run(
        output_dir="unused",
        model=model,
        parallel=parallel or {},
        data={"seq_len": SEQ_LEN},
        optim={"lr": 1e-2, "eps": 1e-4, "grad_clip": 0.5, "weight_decay": 0.1} | (optim or {}),
        balance=balance or {},
        train={"steps": STEPS, "global_batch": GLOBAL_BATCH, "precision": "fp32"} | (train or {}),
        ops=ops or {},
    )
    check(config, world)
    return config


def _grids(step: int, number: int, model: ModelConfig) -> tuple[Grid, ...]:
    """Of the images of a pack. Steps 1 and 3 are text."""
    return () if step % 2 else GRIDS[model.family].get(number, ())


def _pack(step: int, number: int, model: ModelConfig) -> tuple[Tensor, Tensor, list[int]]:
    """Tokens, labels [T] and document lengths of one pack: up to three documents and padding."""
    generator = torch.Generator().manual_seed(1000 * step + number)
    tokens = torch.randint(model.image_token_id, (SEQ_LEN,), generator=generator)
    lengths = [SEQ_LEN - 22 - number % 3, 22, number % 3] if number % 3 else [SEQ_LEN]
    # Images side by side at the start of the pack, inside its first document.
    tiling = Tiling(model)
    tokens[: sum(len(tiling.layout(grid)) for grid in _grids(step, number, model))] = model.image_token_id
    labels = tokens.roll(-1)
    labels[labels == model.image_token_id] = IGNORE_INDEX
    for border in torch.tensor(lengths).cumsum(0).tolist():
        labels[border - 1] = IGNORE_INDEX
    if number % 3:
        labels[SEQ_LEN - number % 3 :] = IGNORE_INDEX  # the last document is padding
    return tokens, labels, lengths


def _tile(size: int, seed: int) -> Tensor:
    """Squares of 2 x 2 pixels of one random colour, uint8 [3, size, size]: SigLIP's image of the hybrid encoder, which
    is half as wide, keeps their contrast."""
    generator, half = torch.Generator().manual_seed(seed), -(-size // 2)
    squares = torch.randint(256, (3, half, half), generator=generator, dtype=torch.uint8)
    return squares.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)[:, :size, :size]


def _tiles(step: int, numbers: Iterable[int], model: ModelConfig) -> list[Tensor]:
    """Those of all images of some packs."""
    return [
        _tile(model.pixel_tower.image_size, seed=7 * step + 100 * number + tile)
        for number in numbers
        for tile in range(sum(grid.tiles for grid in _grids(step, number, model)))
    ]


def _micro_batch(step: int, numbers: list[int], model: ModelConfig, mesh: Mesh, with_pixels: bool) -> Batch:
    packs = [_pack(step, number, model) for number in numbers]
    lengths = [length for pack in packs for length in pack[2]]
    grids = [grid for number in numbers for grid in _grids(step, number, model)]
    pixels, size = _tiles(step, numbers, model), model.pixel_tower.image_size
    if mesh.tp.shares_images:
        mine = tile_share(len(pixels), mesh.tp.rank, mesh.tp.size)
        pixels = pixels[mine.start : mine.stop]
    without_tiles = torch.zeros(0 if step % 2 else 1, 3, size, size, dtype=torch.uint8)
    stacked = torch.stack(pixels) if pixels else without_tiles  # [tiles, 3, S, S]
    return Batch.of(
        Tiling(model),
        tokens=torch.cat([pack[0] for pack in packs]),
        labels=torch.cat([pack[1] for pack in packs]),
        lengths=lengths,
        packs=len(packs),
        grids=grids,
        pixels=stacked if with_pixels else None,
    )


def step_batch(step: int, config: RunConfig, mesh: Mesh) -> StepBatch:
    """This rank's part of a global batch that does not depend on the topology."""
    model, packs = config.model, config.train.global_batch
    share = packs // mesh.dp.size
    numbers = list(range(packs))[mesh.dp.rank * share : (mesh.dp.rank + 1) * share]
    size = config.train.micro_batch
    supervised = sum((_pack(step, number, model)[1] != IGNORE_INDEX).sum().item() for number in range(packs))
    grids = [grid for number in range(packs) for grid in _grids(step, number, model)]
    encodes_ahead = config.parallel.encodes_ahead
    with_pixels = mesh.pp.rank == 0 and not encodes_ahead
    return StepBatch(
        step=step,
        kind="multimodal" if grids else "text",
        micro_batches=tuple(
            _micro_batch(step, numbers[first : first + size], model, mesh, with_pixels)
            for first in range(0, share, size)
        ),
        supervised_tokens=supervised,
        tokens=packs * SEQ_LEN,
        images=len(grids),
        tiles=sum(grid.tiles for grid in grids),
        squared_tokens=0,
        ahead=_ahead(step, config, mesh) if encodes_ahead else None,
    )


def _ahead(step: int, config: RunConfig, mesh: Mesh) -> TilesAhead:
    """This rank's run of tiles in two pieces, the first of one tile, as workers may bring them."""
    share = config.train.global_batch // mesh.dp.size
    by_replica = tuple(
        len(_tiles(step, range(first, first + share), config.model))
        for first in range(0, config.train.global_batch, share)
    )
    mine = encoder_group(config, mesh).share(by_replica)
    pixels = _tiles(step, range(config.train.global_batch), config.model)[mine.start : mine.stop]
    return TilesAhead(by_replica, tuple(torch.stack(piece) for piece in (pixels[:1], pixels[1:]) if piece))


def build(config: RunConfig, ops: Ops | None = None) -> Replica:
    """The replica of a tiny run, with a CPU's operators unless others are given. Collective."""
    return _build_on(start(config), config, ops or choose(CPU), initialise)


def start(config: RunConfig) -> Mesh:
    """DeepSpeed and the process groups of a run. Collective."""
    start_deepspeed("gloo")
    return mesh_of(config, dist.get_world_size(), CPU)


def _build_on(mesh: Mesh, config: RunConfig, ops: Ops, initialise: Initialise) -> Replica:
    stages = build_stages(config, mesh, ops, CPU, initialise)
    # The SAM branch counts from the start: its scale begins at zero, which would hide it.
    for stage in stages:
        for name, parameter in stage.vlm.named_parameters():
            if name.endswith("hd_alpha_downsamples"):
                parameter.data.fill_(0.7)
    # Several buckets in a model of this size too: their reductions start within its backward passes.
    with mock.patch.object(engine, "least_elements", lambda ranks: 4000):
        return Replica(config, mesh, ops, stages)


@dataclass(frozen=True)
class Trained:
    """What a rank knows after a run.

    history: (loss, gradient norm) of each step
    loads:   of the experts in each step
    evaluated: loss of the first batch in an evaluation before it is trained on
    weights: this rank's parameters after the last one, in their place in full tensors of which the rest is NaN
    gradients: the same of Adam's first moments, which are weighted sums of the gradients of all steps
    """

    history: list[tuple[float, float]]
    loads: list[Load | None]
    evaluated: list[float]
    weights: dict[str, Tensor]
    gradients: dict[str, Tensor]


def train(config: RunConfig, checkpoints: str | None = None, ops: Ops | None = None) -> Trained:
    """With `checkpoints`, begins at the newest one there and leaves one behind; without, `ops` are those of `build`."""
    if checkpoints:
        replica, first = resume(config, Path(checkpoints))
    else:
        replica, first = build(config, ops), 0
    steps, evaluated = [], []
    for step in range(first, config.train.steps):
        batch = step_batch(step, config, replica.mesh)
        if step == first:
            evaluated.append(replica.evaluate(batch))
        steps.append(replica.step(batch, config.optim.lr))
    if checkpoints:
        replica.save(Path(checkpoints), config.train.steps, progress={})
    history = [(step.loss, step.grad_norm) for step in steps]
    loads = [step.load for step in steps]
    return Trained(history, loads, evaluated, weights(replica), weights(replica, "exp_avg"))


def resume(config: RunConfig, checkpoints: Path) -> tuple[Replica, int]:
    """The replica of a run from where it starts, as the training loop makes it, and its first step. Collective."""
    mesh = start(config)
    origin = find_origin(config, checkpoints, mesh.control)
    replica = _build_on(mesh, config, choose(CPU), origin.initialise)
    return replica, replica.resume(origin)["step"]


def train_each(configs: list[RunConfig]) -> list[Trained]:
    """One run after the other, in the same processes."""
    return [train(config) for config in configs]


def initial_weights(config: RunConfig, init_from: str | None = None) -> dict[str, Tensor]:
    """Parameters before the first step."""
    replica = build(config)
    if init_from:
        load_weights(init_from, replica.fragments(), config.model, replica.mesh.control)
    return weights(replica)


def weights(replica: Replica, kind: Kind = "param") -> dict[str, Tensor]:
    """What this rank holds of each parameter, or of another of its tensors; NaN elsewhere."""
    found = {}
    for held in replica.fragments():
        if held.kind == kind:
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
