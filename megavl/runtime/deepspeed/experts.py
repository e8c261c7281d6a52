"""Routed experts in the terms of DeepSpeed: where our expert axis becomes its own.

DeepSpeed reduces the gradients of experts over their replicas, partitions their optimizer states over the same ranks
and counts them in the gradient norm once over the expert ranks, provided that it notices them, by four signs:

- a `MoE` instance in the module tree, which DeepSpeed asks to create process groups. Ours has no parameters and
  registers the groups of our mesh. Every rank has one, since the collectives that follow include all ranks;
- `allreduce = False` and `group_name` on each parameter of an expert, without which it would also begin by giving all
  ranks the experts of the first;
- `moe` and `name` on their optimizer groups, which hold nothing else;
- the size of the tensor axis in `deepspeed.utils.groups`, where experts are cut over it: their share of the norm is
  then summed over the tensor ranks too.

The gradient of an expert adds up the tokens of all ranks on its expert axis, then of its replicas; DeepSpeed divides it
by the size of the data axis as it does every other. Where the expert axis has one rank, experts are parameters like all
others.
"""

import itertools

from deepspeed.moe.layer import MoE
from deepspeed.utils import groups
from torch import nn

from megavl.parallel.groups import Mesh
from megavl.parallel.shard import shard_of

_NAME = "experts"


class _Groups(nn.Module):
    """DeepSpeed calls the method of every module that has it; frozen experts need no more."""

    def __init__(self, mesh: Mesh):
        nn.Module.__init__(self)
        self._mesh = mesh

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        mesh = self._mesh
        groups._EXPERT_PARALLEL_GROUP[_NAME] = mesh.ep.group
        groups._EXPERT_DATA_PARALLEL_GROUP[_NAME] = mesh.edp.group
        groups.expert_tensor_parallel_world_size = mesh.tp.size if mesh.ep.cut_width else 1


class _Trained(_Groups, MoE):
    """DeepSpeed looks for the type, and then for optimizer groups of experts."""

    def __init__(self, mesh: Mesh, experts: int):
        super().__init__(mesh)
        self.num_experts = experts


def announce_experts(stages: nn.ModuleList, optimizer_groups: list[dict], mesh: Mesh, experts: int) -> None:
    """Show DeepSpeed the routed experts of this rank's stages, and those among what it is to optimize."""
    if mesh.ep.size == 1:
        return
    trained = [group for group in optimizer_groups if group["experts"]]
    stages[0].experts = _Trained(mesh, experts) if trained else _Groups(mesh)
    for group in trained:
        group |= {"moe": True, "name": _NAME}
    held = (parameter for parameter in stages.parameters() if shard_of(parameter).over("ep"))
    for parameter in itertools.chain(held, *(group["params"] for group in trained)):
        parameter.allreduce, parameter.group_name = False, _NAME
