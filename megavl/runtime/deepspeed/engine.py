"""The DeepSpeed engine of this rank: precision, ZeRO, gradient reduction, clipping and the optimizer step.

One engine holds all stages of the rank. Backward passes only accumulate gradients; `engine.step()` reduces over the
data axis, clips by the global norm and updates. ZeRO-1 in bf16 starts to reduce in the last backward passes of a step.
"""

import itertools
import sys
from collections.abc import Callable, Iterable
from functools import partial

import deepspeed
from torch import nn

from megavl.config.run import RunConfig
from megavl.parallel.groups import Mesh
from megavl.parallel.shard import shard_of
from megavl.runtime.deepspeed.adamw import AdamW
from megavl.runtime.deepspeed.alignment import spaced
from megavl.runtime.deepspeed.axes import ModelParallelUnit
from megavl.runtime.deepspeed.buckets import bucketed, least_elements
from megavl.runtime.deepspeed.clipping import clip_and_keep_norm
from megavl.runtime.deepspeed.experts import announce_experts
from megavl.runtime.deepspeed.zero1 import Zero1
from megavl.runtime.optim import groups_of, parameter_groups

Engine = deepspeed.DeepSpeedEngine
# Told of parameters whose next gradient is their last in this step.
ExpectLast = Callable[[Iterable[nn.Parameter]], None]


def deepspeed_config(config: RunConfig, stage: int) -> dict:
    """DeepSpeed's own configuration of a run under ZeRO stage `stage`."""
    bf16 = config.train.precision == "bf16"
    return {
        # The loss is already divided by the tokens of the global batch: DeepSpeed's batch size scales nothing.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        # DeepSpeed computes the norm only where it clips; the largest float clips nothing.
        "gradient_clipping": config.optim.grad_clip or sys.float_info.max,
        "bf16": {"enabled": bf16, "immediate_grad_update": bf16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": {
            "stage": stage,
            # Overlap needs CUDA streams and, without managed accumulation, stage 2; it is left off at every stage.
            "overlap_comm": False,
            # Small parameters stay whole under ZeRO-3 by default; here every parameter is cut, small models too.
            "stage3_param_persistence_threshold": 0,
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
    }


def build_engine(stages: nn.ModuleList, config: RunConfig, mesh: Mesh, adamw: AdamW) -> tuple[Engine, ExpectLast]:
    """Wrap this rank's stages in an engine. Collective.

    Args:
        stages: of this rank, initialised and frozen
        adamw: implementation of the optimizer

    Returns:
        The engine, and what is called before the last gradients of a step: ZeRO-1 in bf16 then reduces them while the
        backward pass goes on. Nothing else needs the call.
    """
    anchors = {group: [stage.anchors[number] for stage in stages] for number, group in enumerate(groups_of(config))}
    cut = [parameter for parameter in stages.parameters() if shard_of(parameter).over("tp")]
    for parameter in [*cut, *itertools.chain(*anchors.values())]:
        parameter.model_parallel = True  # DeepSpeed's mark: counted in the norm on every tensor rank
    names = {parameter: name for stage in stages for name, parameter in stage.vlm.named_parameters()}
    groups = parameter_groups(((name, parameter) for parameter, name in names.items()), anchors, config.optim)
    stage = config.zero_stage(mesh.dp.size)
    overlaps = stage == 1 and config.train.precision == "bf16"
    if overlaps:
        groups = bucketed(groups, names, partial(_least_of_a_bucket, mesh=mesh))
    if stage:
        registered = set(stages.parameters())
        for group in groups:
            group["params"] = spaced(group["params"], stage, mesh.dp.size)
        # DeepSpeed finds parameters only in modules.
        grouped = itertools.chain.from_iterable(group["params"] for group in groups)
        stages[0].spacers = nn.ParameterList(parameter for parameter in grouped if parameter not in registered)
    if config.model.decoder.moe is not None:
        announce_experts(stages, groups, mesh, config.model.decoder.moe.experts)
    engine, *_ = deepspeed.initialize(
        # ZeRO-3 gathers parameters in the hooks of the outermost module's forward: that must be the stage itself.
        model=stages[0] if len(stages) == 1 else stages,
        optimizer=adamw.build(groups, lr=config.optim.lr, betas=config.optim.betas, eps=config.optim.eps),
        config=deepspeed_config(config, stage),
        mpu=ModelParallelUnit(mesh),
        dist_init_required=False,
    )
    if stage == 0:
        engine.clip_fp32_gradients = partial(clip_and_keep_norm, engine, mesh)
        # One rank has nothing to reduce, but DeepSpeed would copy all gradients into a bucket and back.
        engine.enable_backward_allreduce = mesh.dp.size > 1
    if stage == 3:
        engine.optimizer.step = partial(_step_and_clear, engine.optimizer, engine.optimizer.step)
    if overlaps:
        unread = {*stages[0].spacers, *itertools.chain(*anchors.values())}
        return engine, Zero1(engine.optimizer, mesh, config.optim.grad_clip, unread).expect_last
    return engine, _expect_nothing


def _least_of_a_bucket(group: dict, mesh: Mesh) -> int | None:
    """Elements from which on a bucket of a group is closed; None if this rank has the only copy of the group."""
    ranks = mesh.edp.size if group["experts"] and mesh.ep.size > 1 else mesh.dp.size
    return least_elements(ranks) if ranks > 1 else None


def _expect_nothing(_: Iterable[nn.Parameter]) -> None:
    """For engines that reduce after the last backward pass, or in every one."""


def _step_and_clear(optimizer, step: Callable[[], None]) -> None:
    """Update, then clear ZeRO-3's gradient buffer.

    ZeRO-3 overwrites the buffer of a parameter with its first gradient of a step. A text step has none for the towers,
    which would keep the gradient of the last multimodal step.
    """
    step()
    optimizer.grad_partitions_flat_buffer.zero_()
