"""Stages of this rank: slices of the model list, initialised, frozen and recomputing as the run says."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from megavl.batch import Batch
from megavl.config.model import ModelConfig
from megavl.config.run import RunConfig
from megavl.model.init import initialise
from megavl.model.run_block import RunBlock, call_block
from megavl.model.vlm import VLM
from megavl.ops.dispatch import Ops
from megavl.ops.zero_gradient import with_zero_gradients
from megavl.parallel.groups import Mesh, TensorAxis
from megavl.plan.schedule import stages_of
from megavl.plan.split import split_model
from megavl.runtime.compiled import check_compiler, compilable, compile_blocks, hiding_documents
from megavl.runtime.deepspeed.alignment import UNIT_ELEMENTS
from megavl.runtime.optim import freeze, groups_of
from megavl.runtime.recompute import recomputing
from megavl.runtime.selective import Selective

# (slice, model, seed) -> None, in place.
Initialise = Callable[[nn.Module, ModelConfig, int], None]


class Stage(nn.Module):
    """A slice of the model list.

    It has one anchor for each optimizer group of the model: a parameter that is not read and gets a gradient of zeros.
    Whatever is frozen, and whichever parameters live here, DeepSpeed then finds the same groups on every rank, and
    every output requires a gradient.
    """

    def __init__(self, vlm: VLM, groups: int):
        super().__init__()
        self.vlm = vlm
        self.anchors = nn.ParameterList(nn.Parameter(torch.zeros(UNIT_ELEMENTS)) for _ in range(groups))
        if vlm.stem is not None and vlm.routers:
            # Router counters update in backward. If nothing upstream is trainable, autograd skips that backward; adding
            # a zero that requires a gradient forces it.
            vlm.stem.register_forward_hook(lambda _stem, _inputs, h: with_zero_gradients(h, *self.anchors))

    def forward(self, h: Tensor | None, batch: Batch) -> Tensor:
        """Run the slice.

        Args:
            h: None on the first stage, else [T, D] ([T / tp, D] under sequence parallelism)
            batch: the micro-batch, on the device of the stage

        Returns:
            h of the next stage, or of the last stage the summed -log p of the supervised tokens, float32 [].
        """
        return with_zero_gradients(self.vlm(h, batch), *self.anchors)


def build_stages(
    config: RunConfig, mesh: Mesh, ops: Ops, device: torch.device, initialise: Initialise = initialise
) -> nn.ModuleList:
    """The stages of this rank, in pipeline order.

    Args:
        initialise: gives the buffers of a slice their values, and its parameters unless a checkpoint will
    """
    stages, slices = nn.ModuleList(), split_model(config, mesh.topology.world)
    # The auxiliary loss is the mean over the packs of the global batch. DeepSpeed averages gradients over the data
    # axis, so each rank's share is multiplied by its size.
    auxiliary_scale = config.balance.auxiliary_weight * mesh.dp.size / config.train.global_batch
    run_tower_block = recomputing(ops.products) if config.train.recompute_towers else call_block
    run_block, ops, tp = _recompute(config.train.recompute, ops, mesh.tp)
    if config.train.compile:
        check_compiler(device)
        run_block, ops = hiding_documents(run_block), compilable(ops)
    for index in stages_of(mesh.pp.rank, config.parallel):
        with device:
            vlm = VLM(
                config.model,
                tp,
                ops,
                slices[index].start,
                slices[index].stop,
                mesh.ep,
                auxiliary_scale=auxiliary_scale,
                run_block=run_block,
                run_tower_block=run_tower_block,
            )
        if config.train.compile:
            compile_blocks(vlm.blocks.values())
        initialise(vlm, config.model, config.train.seed)
        freeze(vlm.named_parameters(), config.optim)
        with device:
            stages.append(Stage(vlm, len(groups_of(config))))
    return stages


def _recompute(mode: str, ops: Ops, tp: TensorAxis) -> tuple[RunBlock, Ops, TensorAxis]:
    """How decoder blocks are called, and what they are built of, under `train.recompute`."""
    if mode == "selective":
        selective = Selective()
        return selective.run_block, selective.ops(ops), selective.tensor_axis(tp)
    return recomputing(ops.products) if mode == "block" else call_block, ops, tp
