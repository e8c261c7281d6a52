"""What each rank of a topology holds of a small model's state, as a run with ZeRO-1 would."""

from math import prod

import torch

from megavl.checkpoint.fragments import Fragment
from megavl.config.presets import PRESETS
from megavl.parallel.shard import Cut, Shard
from megavl.parallel.topology import Topology

MODEL = PRESETS["vl_debug"]
STATE = {"config": {"model": MODEL.model_dump(mode="json")}, "seed": 7, "optimizer_step": 3}

# name -> (full shape, dim that tensor parallelism cuts); every third name is another pipeline stage's
TENSORS = {
    "stem.embedding.weight": ((24, 6), 0),
    "stem.siglip.pos_embed": ((1, 9, 5), None),
    "stem.sam.neck.0.weight": ((4, 3, 2, 2), None),
    "blocks.0.attn.q_proj.weight": ((12, 6), 0),
    "blocks.0.attn.o_proj.weight": ((6, 12), 1),
    "head.norm.weight": ((7,), None),
}
OPTIMIZER_KINDS = ("master", "exp_avg", "exp_avg_sq")


def full(kind: str, name: str) -> torch.Tensor:
    """The right values: fp32, different for every tensor and element; parameters are the rounded masters."""
    if kind == "param":
        return full("master", name).to(torch.bfloat16)
    generator = torch.Generator().manual_seed(hash_of(kind + name))
    return torch.randn(TENSORS[name][0], generator=generator)


def hash_of(text: str) -> int:
    return sum(ord(letter) * 31**place for place, letter in enumerate(text)) % 2**31


def fragments(topology: Topology, rank: int, filled: bool, dtype=torch.bfloat16, kinds=OPTIMIZER_KINDS):
    """Fragments of `rank`, with the right values where `filled`, else with NaN.

    Parameters are boxes that all data ranks repeat; of the optimizer's tensors each data rank holds one range of the
    flat concatenation of its stage's boxes, so that ranges begin and end anywhere inside a tensor.
    """
    pp, dp, tp = topology.coordinates(rank)
    shards = {
        name: Shard((Cut("tp", dim, tp, topology.tp),)) if dim is not None else Shard()
        for name, (_, dim) in TENSORS.items()
    }
    stage = list(TENSORS)[pp :: topology.pp]
    found = []
    for name in stage:
        box = shards[name].slice(full("param", name)).contiguous().to(dtype)
        values = box if filled else torch.full_like(box, torch.nan)
        found.append(Fragment.whole(name, "param", TENSORS[name][0], shards[name].offsets(box.shape), values))
    total = sum(prod(shards[name].slice(full("master", name)).shape) for name in stage)
    low, high = total * dp // topology.dp, total * (dp + 1) // topology.dp
    for kind in kinds:
        passed = 0
        for name in stage:
            box = shards[name].slice(full(kind, name))
            start, stop = max(low - passed, 0), min(high - passed, box.numel())
            passed += box.numel()
            if start < stop:
                values = box.reshape(-1)[start:stop].clone() if filled else torch.full((stop - start,), torch.nan)
                offsets = shards[name].offsets(box.shape)
                found.append(Fragment(name, kind, TENSORS[name][0], offsets, tuple(box.shape), start, values))
    return found
