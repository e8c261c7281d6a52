"""This rank's stages of the model list, and the schedule that runs them over the micro-batches of a step.

Schedules are torch.distributed.pipelining's: 1F1B, or interleaved 1F1B with several stages on each rank (Megatron-LM,
arXiv 2104.04473, section 2.2). They carry fixed-shape hidden states only; token ids, document borders and images stay
with the rank: each of its stages takes the micro-batches in order.
"""

from collections.abc import Iterator
from functools import cached_property

import deepspeed
import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B

from megavl.batch import Batch, StepBatch
from megavl.config.run import RunConfig
from megavl.model.init import initialise
from megavl.model.vlm import VLM, call_block
from megavl.ops.dispatch import Ops
from megavl.ops.zero_gradient import with_zero_gradients
from megavl.parallel.groups import Mesh
from megavl.plan.partition import split_layers
from megavl.runtime.alignment import UNIT_ELEMENTS
from megavl.runtime.feed import Feed
from megavl.runtime.optim import freeze, groups_of
from megavl.runtime.recompute import recomputing


class Stage(nn.Module):
    """A slice of the model list over the micro-batches of a step.

    It carries one anchor for each optimizer group of the model: parameters that are not read and get gradients of
    zeros. Whatever is frozen, and whichever parameters live here, DeepSpeed then finds the same groups on every rank,
    and the schedule a gradient on every stage.

    micro_batches: those of the step in order, on the device of the stage; each call takes the next one
    """

    def __init__(self, vlm: VLM, groups: int):
        super().__init__()
        self.vlm = vlm
        self.anchors = nn.ParameterList(nn.Parameter(torch.zeros(UNIT_ELEMENTS)) for _ in range(groups))
        self.micro_batches: Iterator[Batch] = iter(())
        if vlm.stem is not None and vlm.routers:
            # Routers count in their backward pass. If nothing upstream is trainable, autograd skips it.
            vlm.stem.register_forward_hook(lambda _stem, _inputs, h: with_zero_gradients(h, *self.anchors))

    def forward(self, *hidden: Tensor) -> Tensor:
        """hidden: nothing on the first stage, else [T, D] (or [T / tp, D] under sequence parallelism)
        returns: hidden states for the next stage, or float32 [] on the last: summed -log p of the supervised tokens
        """
        output = self.vlm(hidden[0] if hidden else None, next(self.micro_batches))
        return with_zero_gradients(output, *self.anchors)


def build_stages(config: RunConfig, mesh: Mesh, ops: Ops, device: torch.device) -> nn.ModuleList:
    """The stages of this rank, in pipeline order, initialised, frozen and recomputing as the run says."""
    stages = nn.ModuleList()
    # The auxiliary loss is the mean over the packs of the global batch. DeepSpeed averages gradients over the data
    # axis, so each rank's share is multiplied by its size.
    auxiliary_scale = config.balance.auxiliary_weight * mesh.dp.size / config.train.global_batch
    run_block = recomputing(ops.products) if config.train.recompute == "full" else call_block
    for layers in split_layers(config.model.layers, config.parallel)[mesh.pp.rank :: mesh.pp.size]:
        with device:
            vlm = VLM(
                config.model,
                mesh.tp,
                ops,
                layers.start,
                layers.stop,
                mesh.ep,
                auxiliary_scale=auxiliary_scale,
                run_block=run_block,
            )
        initialise(vlm, config.model, config.train.seed)
        freeze(vlm.named_parameters(), config.optim)
        with device:
            stages.append(Stage(vlm, len(groups_of(config))))
    return stages


class Pipeline:
    """Forward and backward of a whole step. Gradients accumulate in `engine`; the loss comes back."""

    def __init__(
        self, engine: deepspeed.DeepSpeedEngine, stages: nn.ModuleList, config: RunConfig, mesh: Mesh, ops: Ops
    ):
        self._engine = engine
        self._products = ops.products
        self._stages = stages
        self._mesh = mesh
        self._normaliser = 1.0
        self._config = config
        self._schedule = self._build_schedule(config) if mesh.pp.size > 1 else None

    def _build_schedule(self, config: RunConfig) -> Schedule1F1B | ScheduleInterleaved1F1B:
        mesh, parallel, train = self._mesh, config.parallel, config.train
        device = next(self._stages.parameters()).device
        dtype = torch.bfloat16 if train.precision == "bf16" else torch.float32
        tokens = config.data.seq_len * train.micro_batch // (mesh.tp.size if mesh.tp.sequence else 1)
        hidden = torch.empty(tokens, config.model.decoder.width, dtype=dtype, device=device, requires_grad=True)
        loss = torch.empty((), device=device, requires_grad=True)
        stages = []
        for virtual, stage in enumerate(self._stages):
            index = virtual * mesh.pp.size + mesh.pp.rank
            last = index == parallel.num_stages - 1
            stages.append(
                PipelineStage(
                    stage,
                    index,
                    parallel.num_stages,
                    device,
                    input_args=() if index == 0 else (hidden,),
                    # Outputs that require a gradient, or none would flow back through frozen stages.
                    output_args=(loss if last else hidden,),
                    group=mesh.pp.group,
                )
            )
        micro_batches = train.global_batch // (mesh.dp.size * train.micro_batch)
        # DeepSpeed accumulates in hooks, before the schedule would scale: the loss is divided beforehand instead.
        if len(stages) == 1:
            return Schedule1F1B(stages[0], micro_batches, loss_fn=self._scaled, scale_grads=False)
        return ScheduleInterleaved1F1B(stages, micro_batches, loss_fn=self._scaled, scale_grads=False)

    @cached_property
    def _evaluation(self) -> Schedule1F1B | ScheduleInterleaved1F1B:
        """A schedule with buffers of its own: torch 2.11 decides at the first step whether they carry gradients."""
        return self._build_schedule(self._config)

    def _scaled(self, summed_loss: Tensor, _target: Tensor | None = None) -> Tensor:
        return summed_loss / self._normaliser

    def run(self, batch: StepBatch) -> Tensor:
        """Forward and backward passes. Returns float32 []: this rank's part of the step's loss, 0 on ranks without the
        last stage.

        The loss is the sum over the supervised tokens of the global batch divided by their number. DeepSpeed averages
        gradients over the data axis, so each rank's share is taken times its size.
        """
        self._take(batch)
        with self._products:
            return self._summed(self._forward_backward(len(batch.micro_batches)))

    def evaluate(self, batch: StepBatch) -> Tensor:
        """Forward passes alone; returns what `run` does. Without gradients, as torch.no_grad() has it."""
        self._take(batch)
        with self._products:
            return self._summed(self._forward(len(batch.micro_batches)))

    def _take(self, batch: StepBatch) -> None:
        """Give the stages the micro-batches of a step, and the loss its divisor."""
        self._normaliser = batch.supervised_tokens / self._mesh.dp.size
        feed = Feed(batch.micro_batches, self._engine.device)
        for stage in self._stages:
            stage.micro_batches = feed.texts() if stage.vlm.stem is None else feed.batches()

    def _forward_backward(self, micro_batches: int) -> list[Tensor]:
        """Scaled loss of each micro-batch; none on ranks without the last stage."""
        losses: list[Tensor] = []
        if self._schedule is not None:
            # The last stage computes the loss; the schedule requires a target all the same.
            self._schedule.step(target=torch.zeros(micro_batches), losses=losses, return_outputs=False)
            return losses
        for _ in range(micro_batches):
            loss = self._scaled(self._engine())
            self._engine.backward(loss, scale_wrt_gas=False)
            losses.append(loss)
        return losses

    def _forward(self, micro_batches: int) -> list[Tensor]:
        """As `_forward_backward`, without the backward passes."""
        losses: list[Tensor] = []
        if self._schedule is not None:
            self._evaluation.eval(target=torch.zeros(micro_batches), losses=losses, return_outputs=False)
            return losses
        return [self._scaled(self._engine()) for _ in range(micro_batches)]

    def _summed(self, losses: list[Tensor]) -> Tensor:
        """float32 []."""
        if not losses:
            return torch.zeros((), device=self._engine.device)
        return torch.stack([loss.detach() for loss in losses]).sum() / self._mesh.dp.size
