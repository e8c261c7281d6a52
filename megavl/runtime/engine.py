"""The DeepSpeed engine of this rank: precision, ZeRO, gradient reduction, clipping and the optimizer step.

One engine holds all stages of the rank. Backward passes (ours or the pipeline schedule's) only accumulate;
`engine.step()` reduces over the data axis, clips by the global norm and updates.
"""

import itertools
import sys
from collections.abc import Callable
from functools import partial

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.moe.utils import is_moe_param
from deepspeed.runtime.utils import is_model_parallel_parameter
from torch import Tensor, nn

from megavl.config.run import RunConfig
from megavl.parallel.groups import Mesh
from megavl.parallel.shard import shard_of
from megavl.runtime.alignment import spaced
from megavl.runtime.experts import announce_experts
from megavl.runtime.optim import build_optimizer, groups_of, parameter_groups


class ModelParallelUnit:
    """Our axes under the names that DeepSpeed asks for.

    DeepSpeed sums the squared gradient norm over the model-parallel group (tensor and pipeline ranks), and counts a
    parameter that is not cut on tensor rank 0 only: so its "model parallel rank" is the tensor rank.
    """

    def __init__(self, mesh: Mesh):
        self._mesh = mesh

    def get_model_parallel_rank(self) -> int:
        return self._mesh.tp.rank

    def get_model_parallel_world_size(self) -> int:
        return self._mesh.model.size

    def get_model_parallel_group(self):
        return self._mesh.model.group

    def get_data_parallel_rank(self) -> int:
        return self._mesh.dp.rank

    def get_data_parallel_world_size(self) -> int:
        return self._mesh.dp.size

    def get_data_parallel_group(self):
        return self._mesh.dp.group

    def get_data_parallel_group_ranks(self) -> list[int]:
        return next(ranks for ranks in self._mesh.topology.groups("dp") if deepspeed.comm.get_rank() in ranks)

    def get_tensor_model_parallel_rank(self) -> int:
        return self._mesh.tp.rank

    def get_tensor_model_parallel_world_size(self) -> int:
        return self._mesh.tp.size

    def get_tensor_model_parallel_group(self):
        return self._mesh.tp.group

    def get_pipeline_model_parallel_world_size(self) -> int:
        return self._mesh.pp.size

    def get_pipeline_model_parallel_group(self):
        return self._mesh.pp.group


def deepspeed_config(config: RunConfig) -> dict:
    """DeepSpeed's own configuration of a run."""
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
            "stage": config.parallel.zero,
            # Overlap needs CUDA streams and, without managed accumulation, stage 2; it is left off at every stage.
            "overlap_comm": False,
            # Small parameters stay whole under ZeRO-3 by default; here every parameter is cut, small models too.
            "stage3_param_persistence_threshold": 0,
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
    }


def _clip_and_keep_norm(engine: deepspeed.DeepSpeedEngine, mesh: Mesh) -> None:
    """Clip without ZeRO: DeepSpeed sums the norm in fp32 and drops it; this sums in fp64, as ZeRO does, and keeps it.

    The towers have no gradient after a text step, and Adam would skip them. Gradients of zeros, which ZeRO's buffers
    hold, still decay their moments and weights; so missing gradients become zeros here.
    """
    parameters = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    counted = [p for p in parameters if mesh.tp.rank == 0 or is_model_parallel_parameter(p)]
    experts = _squared_norm([p.grad for p in counted if is_moe_param(p)], engine.device)
    dist.all_reduce(experts, group=mesh.ep.group)
    squared = experts + _squared_norm([p.grad for p in counted if not is_moe_param(p)], engine.device)
    dist.all_reduce(squared, group=mesh.model.group)
    norm = squared.sqrt()
    if norm > engine.gradient_clipping():
        torch._foreach_mul_([p.grad for p in parameters], (engine.gradient_clipping() / (norm + 1e-6)).item())
    engine._global_grad_norm = norm


def _step_and_clear(optimizer, step: Callable[[], None]) -> None:
    """Update, then clear ZeRO-3's gradient buffer.

    ZeRO-3 overwrites the buffer of a parameter with its first gradient of a step. A text step has none for the towers,
    which would keep the gradient of the last multimodal step.
    """
    step()
    optimizer.grad_partitions_flat_buffer.zero_()


def _squared_norm(grads: list[Tensor], device: torch.device) -> Tensor:
    """float64 []."""
    norms = [torch.linalg.vector_norm(grad, dtype=torch.float64) for grad in grads]
    return sum((norm**2 for norm in norms), start=torch.zeros((), dtype=torch.float64, device=device))


def build_engine(stages: nn.ModuleList, config: RunConfig, mesh: Mesh) -> deepspeed.DeepSpeedEngine:
    """Wrap this rank's stages, whose parameters are initialised and frozen as they should be. Collective."""
    anchors = {group: [stage.anchors[number] for stage in stages] for number, group in enumerate(groups_of(config))}
    cut = [parameter for parameter in stages.parameters() if shard_of(parameter).over("tp")]
    for parameter in [*cut, *itertools.chain(*anchors.values())]:
        parameter.model_parallel = True  # DeepSpeed's mark: counted in the norm on every tensor rank
    named_parameters = itertools.chain.from_iterable(stage.vlm.named_parameters() for stage in stages)
    groups = parameter_groups(named_parameters, anchors, config.optim)
    if config.parallel.zero:
        registered = set(stages.parameters())
        for group in groups:
            group["params"] = spaced(group["params"], config.parallel.zero, mesh.dp.size)
        # DeepSpeed finds parameters only in modules.
        grouped = itertools.chain.from_iterable(group["params"] for group in groups)
        stages[0].spacers = nn.ParameterList(parameter for parameter in grouped if parameter not in registered)
    if config.model.decoder.moe is not None:
        announce_experts(stages, groups, mesh, config.model.decoder.moe.experts)
    engine, *_ = deepspeed.initialize(
        # ZeRO-3 gathers parameters in the hooks of the outermost module's forward: that must be the stage itself.
        model=stages[0] if len(stages) == 1 else stages,
        optimizer=build_optimizer(groups, config.optim, next(stages.parameters()).device, config.parallel.zero),
        config=deepspeed_config(config),
        mpu=ModelParallelUnit(mesh),
        dist_init_required=False,
    )
    if config.parallel.zero == 0:
        engine.clip_fp32_gradients = partial(_clip_and_keep_norm, engine, mesh)
    if config.parallel.zero == 3:
        engine.optimizer.step = partial(_step_and_clear, engine.optimizer, engine.optimizer.step)
    return engine
