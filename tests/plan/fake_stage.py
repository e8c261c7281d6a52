"""The stages of a rank on fake tensors: the real modules, the operators of a GPU, no memory and no other process."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megavl.batch import Batch, tile_share
from megavl.config.run import RunConfig
from megavl.config.tiles import Tiling
from megavl.config.tokens import IGNORE_INDEX
from megavl.ops.grouped import Groups
from megavl.parallel.groups import Axis, ExpertAxis, Mesh, TensorAxis
from megavl.parallel.topology import Topology
from megavl.plan.message import Message
from megavl.rehearsal.gpus import GPUS, gpu_ops
from megavl.rehearsal.reads import Answers
from megavl.rehearsal.storages import Storages
from megavl.rehearsal.triton_launches import noted_launches
from megavl.runtime.deepspeed.alignment import spaced
from megavl.runtime.optim import groups_of, parameter_groups
from megavl.runtime.stage import Stage, build_stages


def make_batch(config: RunConfig, images: int, document: int) -> Batch:
    """A micro-batch of equal documents with `images` images at its beginning. Placeholders and the last token of each
    document have no label."""
    tiling, model, total = Tiling(config.model), config.model, config.data.seq_len * config.train.micro_batch
    grids, tensor = (tiling.grids[0],) * images, config.parallel.tensor
    placeholders = images * int(tiling.tokens[0])
    tokens, labels = torch.ones(2, total, dtype=torch.int64)
    tokens[:placeholders] = model.image_token_id
    labels[:placeholders] = labels[document - 1 :: document] = IGNORE_INDEX
    tiles = sum(grid.tiles for grid in grids)
    here = len(tile_share(tiles, 0, tensor)) if config.parallel.vision == "sharded" else tiles
    side = model.pixel_tower.image_size
    pixels = torch.zeros(here, 3, side, side, dtype=torch.uint8)
    return Batch.of(tiling, tokens, labels, [document] * (total // document), config.train.micro_batch, grids, pixels)


@contextmanager
def fake_mesh(config: RunConfig, stage: int = 0) -> Iterator[Mesh]:
    """The mesh of the first tensor and expert rank of a stage, one stage to a rank. Collectives return at once, and
    every expert is equally busy."""
    parallel = config.parallel
    tp, ep, pp = parallel.tensor, parallel.expert, parallel.num_stages
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=tp * ep)
    try:
        tensor, expert = dist.new_group(list(range(tp))), dist.new_group(list(range(0, tp * ep, tp)))
        expert_axis = ExpertAxis(0, ep, expert, parallel.expert_width == "cut" and tp > 1)
        yield Mesh(
            Topology(pp, ep, tp, ep),
            pp=Axis(stage, pp),
            dp=Axis(0, ep),
            tp=TensorAxis(0, tp, tensor, parallel.sequence and tp > 1, parallel.vision == "sharded" and tp > 1),
            ep=replace(expert_axis, read_sizes=Answers().equal_sizes(expert_axis)),
            edp=Axis(),
            model=Axis(),
        )
    finally:
        dist.destroy_process_group()


@contextmanager
def fake_gpu(config: RunConfig) -> Iterator[FakeTensorMode]:
    """Fake tensors in the precision of the run. No kernel of Triton is launched, and every expert is equally busy."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if config.train.precision == "bf16" else torch.float32)
    try:
        with (
            FakeTensorMode() as mode,
            noted_launches(lambda tensors: None),
            mock.patch.object(Groups, "sizes", property(lambda groups: _equal_sizes(config, len(groups.ends)))),
        ):
            yield mode
    finally:
        torch.set_default_dtype(before)


def _equal_sizes(config: RunConfig, experts: int) -> list[int]:
    """Rows of each expert of a rank."""
    parallel, rows = (
        config.parallel,
        config.data.seq_len * config.train.micro_batch * config.model.decoder.moe.per_token,
    )
    rows //= 1 if parallel.expert_width == "cut" else parallel.tensor
    return [rows // experts + (expert < rows % experts) for expert in range(experts)]


def fake_stage(config: RunConfig, mesh: Mesh) -> Stage:
    """The stage of the pipeline rank of `mesh`, its trainable parameters end to end in the buffers of their groups."""
    ops = gpu_ops(GPUS["hopper"], True, [("expert_mlp", "torch"), *config.ops])
    (stage,) = build_stages(config, mesh, ops, torch.device("cpu"), initialise=lambda *_: None)
    anchors = {group: [anchor] for group, anchor in zip(groups_of(config), stage.anchors, strict=True)}
    for group in parameter_groups(stage.vlm.named_parameters(), anchors, config.optim):
        if config.parallel.zero in (1, 2):
            _lay_flat(spaced(group["params"], 1, 1))
    return stage


def _lay_flat(parameters: list[nn.Parameter]) -> None:
    flat, offset = torch.empty(sum(parameter.numel() for parameter in parameters)), 0
    for parameter in parameters:
        parameter.data = flat[offset : offset + parameter.numel()].view_as(parameter)
        offset += parameter.numel()


def _drop_gradient(parameter: nn.Parameter) -> None:
    parameter.grad = None


def hidden(config: RunConfig) -> Tensor:
    """What a stage receives from the one before: a leaf that requires a gradient."""
    tokens = config.data.seq_len * config.train.micro_batch
    tokens //= config.parallel.tensor if config.parallel.sequence else 1
    return torch.empty(tokens, config.model.decoder.width, requires_grad=True)


class Collectives(TorchDispatchMode):
    """While entered, records the collectives as messages. Nothing is sent."""

    _KINDS = {
        "allreduce_": "all_reduce",
        "_allgather_base_": "all_gather",
        "_reduce_scatter_base_": "reduce_scatter",
        "alltoall_base_": "all_to_all",
    }

    def __init__(self, mesh: Mesh):
        super().__init__()
        self._axes = {mesh.tp.group.group_name: "tensor", mesh.ep.group.group_name: "expert"}
        self.messages: list[Message] = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation.namespace == "c10d":
            kind = self._KINDS[operation.overloadpacket.__name__]
            tensors = tree_leaves([arg for arg in args if isinstance(arg, Tensor | list)])
            size = max(x.numel() * x.element_size() for x in tensors if isinstance(x, Tensor))
            group = dist.ProcessGroup.unbox(next(arg for arg in args if isinstance(arg, torch.ScriptObject)))
            self.messages.append(Message(self._axes[group.group_name], kind, size, group.size()))
        return operation(*args, **(kwargs or {}))


def messages(config: RunConfig, batch: Batch, index: int = 0) -> tuple[list[Message], list[Message]]:
    """Collectives of a micro-batch on stage `index`, of the forward and of the backward pass."""
    with fake_mesh(config, index) as mesh, fake_gpu(config) as mode:
        stage = fake_stage(config, mesh)
        fake_batch, h = batch.map_tensors(mode.from_tensor), None if stage.vlm.stem is not None else hidden(config)
        with Collectives(mesh) as collectives:
            out = stage(h, fake_batch)
            forward = list(collectives.messages)
            torch.autograd.backward(out, None if out.dim() == 0 else torch.empty_like(out))
        return forward, collectives.messages[len(forward) :]


def held(config: RunConfig, batch: Batch, index: int = 0) -> tuple[int, int, int]:
    """Bytes of a micro-batch on stage `index`: in use between its forward and its backward pass, output included and
    input not, and the most that are in use in the backward pass."""
    with fake_mesh(config, index) as mesh, fake_gpu(config) as mode:
        stage = fake_stage(config, mesh)
        fake_batch = batch.map_tensors(mode.from_tensor)
        h = None if stage.vlm.stem is not None else hidden(config)
        for parameter in stage.parameters():  # as in the engine, which adds each gradient to its fp32 buffer at once
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(_drop_gradient)
        with Storages() as storages:
            out = stage(h, fake_batch)
            gc.collect()
            kept, in_forward = storages.bytes, storages.peak
            storages.peak = kept
            if out.requires_grad:  # a stage alone, without an anchor, may have nothing to train
                torch.autograd.backward(out, None if out.dim() == 0 else torch.empty_like(out))
        return kept, storages.peak, in_forward
