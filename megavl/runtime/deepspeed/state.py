"""The state of the run as named fragments: what this rank holds of every parameter, its fp32 master and Adam moments.

A persistent buffer (the bias of a router) is written as a parameter without master and moments.

DeepSpeed keeps masters and moments in flat buffers. Under ZeRO-1 and 2 each parameter knows its part of them
(`_hp_mapping`); under ZeRO-3 each rank holds one flat range of every parameter; without ZeRO the parameter is its own
master.
"""

from collections.abc import Iterator

import deepspeed
import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from megavl.checkpoint.fragments import Fragment
from megavl.parallel.shard import shard_of
from megavl.runtime.deepspeed.adamw import first_step

MOMENTS = ("exp_avg", "exp_avg_sq")


def fragments(engine: deepspeed.DeepSpeedEngine, stages: nn.ModuleList, dp_rank: int) -> list[Fragment]:
    """Everything that this rank holds, as views: what is written is what is there, what is read lands in place."""
    _materialise_moments(engine)
    trained = [
        Fragment(name, kind, shard.full_shape(shape), shard.offsets(shape), shape, start, values)
        for stage in stages
        for name, parameter in stage.vlm.named_parameters()
        for shape, shard in [(tuple(getattr(parameter, "ds_shape", parameter.shape)), shard_of(parameter))]
        for kind, start, values in _tensors(engine, parameter, dp_rank)
    ]
    buffers = [
        Fragment.whole(name, "param", tuple(buffer.shape), (0,) * buffer.dim(), buffer)
        for stage in stages
        for name, buffer in _persistent_buffers(stage.vlm)
    ]
    return trained + buffers


def gradients(engine: deepspeed.DeepSpeedEngine, stages: nn.ModuleList) -> list[Tensor]:
    """Gradients of the weights as they are kept from one backward pass to the next: flat buffers, or one tensor for
    each parameter that has had a gradient."""
    held = [parameter.grad for parameter in stages.parameters() if parameter.grad is not None]
    zero = engine.optimizer
    match zero:
        case BF16_Optimizer():
            held += zero.fp32_groups_gradients_flat
        case DeepSpeedZeroOptimizer_Stage3():
            held.append(zero.grad_partitions_flat_buffer)
        case DeepSpeedZeroOptimizer():
            held += [each for group in zero.averaged_gradients.values() if group is not None for each in group]
    return held


def _persistent_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers that belong to the state of the model, by name."""
    parameters = {name for name, _ in module.named_parameters()}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if name not in parameters:
            yield name, tensor


def _tensors(engine: deepspeed.DeepSpeedEngine, parameter: nn.Parameter, dp_rank: int) -> Iterator[tuple]:
    """(kind, first element within the local parameter, flat values) of one parameter."""
    if hasattr(parameter, "ds_id"):
        yield from _zero3_tensors(engine, parameter, dp_rank)
        return
    yield "param", 0, parameter.data.view(-1)
    if not parameter.requires_grad:
        return
    if not hasattr(parameter, "_hp_mapping"):
        yield "master", 0, parameter.data.view(-1)
        for moment in MOMENTS:
            yield moment, 0, engine.basic_optimizer.state[parameter][moment].view(-1)
    elif parameter._hp_mapping is not None:  # None: the flat part of this rank begins after or ends before it
        held = parameter._hp_mapping
        start, here = held.lp_fragment_address.start, held.hp_fragment_address
        # Looked up by group: DeepSpeed's own links to the moments are made when only the first group has any.
        (flat,) = engine.basic_optimizer.param_groups[held.param_group_index]["params"]
        yield "master", start, flat.data.narrow(0, here.start, here.numel)
        for moment in MOMENTS:
            yield moment, start, engine.basic_optimizer.state[flat][moment].narrow(0, here.start, here.numel)


def _zero3_tensors(engine: deepspeed.DeepSpeedEngine, parameter: nn.Parameter, dp_rank: int) -> Iterator[tuple]:
    """Each rank holds an equal range of the flat parameter; the last ones are padded."""
    start = dp_rank * parameter.ds_tensor.numel()
    length = min(parameter.ds_tensor.numel(), parameter.ds_numel - start)
    if length <= 0:
        return

    def partition(key: str | None) -> Tensor:
        flat, _ = engine.optimizer._get_fp32_opt_state_partition(
            parameter, release_swap_buffers=False, optim_state_key=key
        )
        return flat.data[:length]

    yield "param", start, parameter.ds_tensor.data.view(-1)[:length]
    if parameter.requires_grad:
        yield "master", start, partition(None)
        for moment in MOMENTS:
            yield moment, start, partition(moment)


def _materialise_moments(engine: deepspeed.DeepSpeedEngine) -> None:
    """Adam makes its moments at its first step; a run that is resumed before that reads them from the checkpoint."""
    adam, zero = engine.basic_optimizer, engine.optimizer
    if isinstance(zero, DeepSpeedZeroOptimizer_Stage3):
        masters = zero.fp32_partitioned_groups_flat
    else:
        masters = [master for group in adam.param_groups for master in group["params"]]
    for master in masters:
        if not adam.state[master]:
            moments = {moment: torch.zeros_like(master.data) for moment in MOMENTS}
            adam.state[master] = {"step": first_step(adam, master), **moments}
