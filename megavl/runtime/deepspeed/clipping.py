"""Clipping by the global gradient norm without ZeRO."""

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.moe.utils import is_moe_param
from deepspeed.runtime.utils import is_model_parallel_parameter
from torch import Tensor

from megavl.parallel.groups import Mesh
from megavl.runtime.deepspeed.adamw import scale_gradients
from megavl.runtime.deepspeed.norm import squared_norm


def clip_and_keep_norm(engine: deepspeed.DeepSpeedEngine, mesh: Mesh) -> None:
    """Clip without ZeRO: DeepSpeed sums the norm in fp32 and drops it; this sums in fp64, and keeps it.

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
    norm = squared.sqrt().float()
    scale_gradients(engine.basic_optimizer, (engine.gradient_clipping() / (norm + 1e-6)).clamp(max=1.0))
    # DeepSpeed sets it only under ZeRO, and get_global_grad_norm() reads it.
    engine._global_grad_norm = norm


def _squared_norm(grads: list[Tensor], device: torch.device) -> Tensor:
    """float64 []."""
    return sum(map(squared_norm, grads), start=torch.zeros((), dtype=torch.float64, device=device))
