"""ZeRO-1 in bf16: accumulation, reduction and update in few kernels, without a wait for the device.

DeepSpeed's `BF16_Optimizer` makes the buffers: of each optimizer group the flat bf16 parameters, their flat fp32
gradients, and this rank's part of the fp32 masters (ZeRO, arXiv 1910.02054, section 5.1). Its own step all-reduces all
gradients, computes a norm for each parameter, and reads the norm on the host before it clips. Here each rank receives
only the sum of its own part, and everything that follows reads and writes that part.

Groups are buckets (`megavl.runtime.deepspeed.buckets`). A group is reduced while the last backward passes of a step
compute the gradients of the groups before it. Reductions start from the last group to the first on every rank: a group
that is complete waits for those after it, so the order of the messages does not depend on the order of gradients.
"""

from collections.abc import Container, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import Tensor, nn

from megavl.parallel.groups import Mesh
from megavl.parallel.shard import shard_of
from megavl.parallel.versions import all_gather_single, reduce_scatter_single
from megavl.runtime.deepspeed.adamw import scale_gradients
from megavl.runtime.deepspeed.norm import squared_norm


@dataclass(frozen=True)
class _Group:
    """Buffers of one optimizer group, [N] each over all ranks that hold copies of it, and [N / size] on this rank.

    parameters:      bf16 [N]
    parameters_part: bf16 [N / size], a view
    gradients:       fp32 [N]
    gradients_part:  fp32 [N / size], a view
    masters_part:    fp32 [N / size]
    counted:         slices of `gradients_part` that this rank adds to the norm
    ranks:           the group of these ranks
    """

    parameters: Tensor
    parameters_part: Tensor
    gradients: Tensor
    gradients_part: Tensor
    masters_part: nn.Parameter
    counted: tuple[Tensor, ...]
    ranks: dist.ProcessGroup


class Zero1:
    """Takes the place of the methods of `optimizer` that DeepSpeed's engine calls."""

    def __init__(self, optimizer: BF16_Optimizer, mesh: Mesh, max_norm: float, unread: Container[nn.Parameter]):
        """
        Args:
            optimizer: of an engine that has just been built, its groups in the order in which the model has them
            mesh: of the run
            max_norm: largest global gradient norm; 0 does not clip
            unread: parameters that nothing reads, whose gradients are zeros if they have any
        """
        self._optimizer, self._dp_size, self._max_norm = optimizer, mesh.dp.size, max_norm
        self._groups = [_group(optimizer, index, mesh) for index in range(len(optimizer.bf16_groups))]
        for group in self._groups:
            group.masters_part.grad = group.gradients_part
        self._unread = unread
        # Of each group: parameters that get gradients.
        self._read = [sum(parameter not in unread for parameter in group) for group in optimizer.bf16_groups]
        self._begin()
        optimizer._update_hp_grad = self.accumulate
        optimizer.reduce_gradients = self.reduce
        optimizer.step = self.step
        optimizer.zero_grad = self.zero_grad

    def _begin(self) -> None:
        """No gradient of the next step has arrived."""
        # Indices (group, parameter) of the gradients of this step. All other buffers hold values of earlier steps.
        self._written: set[tuple[int, int]] = set()
        # Parameters whose next gradient is their last; number in each group of those whose last has not arrived.
        self._last: set[nn.Parameter] = set()
        self._missing = [*self._read]
        # Groups whose reduction has not started, and the reductions that have.
        self._waiting = [*range(len(self._groups))]
        self._works: list[dist.Work] = []

    def expect_last(self, parameters: Iterable[nn.Parameter]) -> None:
        """Announce that the next gradient of each of these parameters is its last in this step. A parameter that is
        never announced, or gets no gradient, delays its group to `reduce`."""
        self._last.update(parameters)

    @torch.no_grad()
    def accumulate(self, parameter: nn.Parameter, group: int, index: int, clear_lp_grads: bool) -> None:
        """Add the gradient of a parameter to its fp32 buffer; the first gradient of a step overwrites the buffer.
        Either is one kernel, without an fp32 copy of the gradient.

        Raises:
            RuntimeError: the reduction of the group has started.
        """
        if parameter.grad is None or parameter in self._unread:
            return
        if group not in self._waiting:
            raise RuntimeError(
                f"parameter {index} of optimizer group {group} has got a gradient after its last one was announced. "
                "The group is being reduced, so this gradient would be lost. Call expect_last before the last one only."
            )
        total = self._optimizer.fp32_groups_gradients[group][index]
        gradient = parameter.grad.view(total.shape)
        if (group, index) in self._written:
            total.add_(gradient)
        else:
            total.copy_(gradient)
            self._written.add((group, index))
        if parameter in self._last:
            self._last.remove(parameter)
            self._missing[group] -= 1
            while self._waiting and not self._missing[self._waiting[-1]]:
                self._start(self._waiting.pop())

    def _start(self, index: int) -> None:
        """Start to sum the gradients of a group over the data axis; each rank receives its own part alone. Parameters
        without a gradient in this step, such as those of the towers in a text step and those that nothing reads, get
        zeros."""
        gradients, group = self._optimizer.fp32_groups_gradients[index], self._groups[index]
        if unwritten := [each for number, each in enumerate(gradients) if (index, number) not in self._written]:
            torch._foreach_zero_(unwritten)
        if dist.get_world_size(group.ranks) > 1:
            work = reduce_scatter_single(group.gradients_part, group.gradients, group=group.ranks, async_op=True)
            self._works.append(work)

    @torch.no_grad()
    def reduce(self, pipeline_parallel: bool) -> None:
        """Start the reductions that have not started, and wait for all. `step` divides the sums."""
        while self._waiting:
            self._start(self._waiting.pop())
        for work in self._works:
            work.wait()
        self._begin()

    @torch.no_grad()
    def step(self) -> None:
        """Clip, update the masters, and gather the bf16 parameters."""
        norm = self._norm()
        self._optimizer._global_grad_norm = norm
        ratio = (self._max_norm / (norm + 1e-6)).clamp(max=1.0) if self._max_norm else torch.ones_like(norm)
        # The gradients of experts are sums over the expert axis already, and are averaged as all others are.
        scale_gradients(self._optimizer.optimizer, ratio / self._dp_size)
        self._optimizer.optimizer.step()
        for group in self._groups:
            group.parameters_part.copy_(group.masters_part)
            if dist.get_world_size(group.ranks) > 1:
                all_gather_single(group.parameters, group.parameters_part, group=group.ranks)

    def zero_grad(self) -> None:
        """Drop the gradients of this step, reduced or not: the first ones of the next step overwrite them."""
        for work in self._works:
            work.wait()
        self._begin()

    def _norm(self) -> Tensor:
        """Global norm of the averaged gradient, float32 []. Every element is counted on one rank of the world."""
        device = self._groups[0].gradients.device
        squared = torch.zeros((), dtype=torch.float64, device=device)
        for group in self._groups:
            for part in group.counted:
                squared += squared_norm(part)
        dist.all_reduce(squared)
        return (squared.sqrt() / self._dp_size).float()


def _group(optimizer: BF16_Optimizer, index: int, mesh: Mesh) -> _Group:
    ranks = optimizer.real_dp_process_group[index]
    gradients_part = optimizer.fp32_groups_gradient_flat_partition[index]
    return _Group(
        parameters=optimizer.bf16_groups_flat[index],
        parameters_part=optimizer.bf16_partitioned_groups[index][dist.get_rank(ranks)],
        gradients=optimizer.fp32_groups_gradients_flat[index],
        gradients_part=gradients_part,
        masters_part=optimizer.fp32_groups_flat_partition[index],
        counted=_counted(optimizer.bf16_groups[index], gradients_part, mesh),
        ranks=ranks,
    )


def _counted(parameters: list[nn.Parameter], gradients_part: Tensor, mesh: Mesh) -> tuple[Tensor, ...]:
    """Slices of this rank's gradients that belong to parameters which no other tensor rank counts."""
    slices: list[list[int]] = []
    for parameter in parameters:
        held = parameter._hp_mapping  # None: no part of it is on this rank
        if held is None or not (mesh.tp.rank == 0 or shard_of(parameter).over("tp")):
            continue
        start, length = held.hp_fragment_address.start, held.hp_fragment_address.numel
        if slices and slices[-1][0] + slices[-1][1] == start:
            slices[-1][1] += length
        else:
            slices.append([start, length])
    return tuple(gradients_part.narrow(0, start, length) for start, length in slices)
