"""Kernels that a process launches, bytes that they touch, and messages between ranks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megavl.rehearsal.launches import distinct_bytes, launches_kernel

# By the names that `megavl.parallel.groups` gives to process groups.
_AXES = {
    "megavl:tp": "tensor",
    "megavl:ep": "expert",
    "megavl:pp": "pipeline",
    "megavl:dp": "data",
    "megavl:edp": "data, of experts",
    "megavl:model": "tensor and pipeline",
    "megavl:control": "control",
}
_WORLD = "world"
_OPERATIONS = {
    "allreduce_": "all-reduce",
    "_allgather_base_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "alltoall_base_": "all-to-all",
    "recv_": "receive",
}
_PROCESS_GROUP = "__torch__.torch.classes.c10d.ProcessGroup"


@dataclass
class Messages:
    """Messages of one operation over one axis. bytes: of whole tensors, the larger of input and output"""

    count: int = 0
    bytes: int = 0


@dataclass
class Counts:
    """What one phase of a step does on this rank.

    kernels:  operations that launch one, and Triton kernels
    bytes:    that they read and write
    messages: by axis and operation; none over an axis of one rank
    """

    kernels: int = 0
    bytes: int = 0
    messages: dict[tuple[str, str], Messages] = field(default_factory=dict)

    def launch(self, tensors: Sequence[Tensor]) -> None:
        """Count a kernel with the tensors that it reads and writes."""
        self.kernels += 1
        self.bytes += sum(map(distinct_bytes, tensors))


class Counting(TorchDispatchMode):
    """While entered, counts into `counts`, which may be replaced.

    Args:
        message: called with the operation ("send", ...) and the tensors of each message
    """

    def __init__(self, message: Callable[[str, Sequence[Tensor]], None]) -> None:
        super().__init__()
        self.counts = Counts()
        self._message = message

    def __torch_dispatch__(
        self, operation: OpOverload, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = operation(*args, **(kwargs or {}))
        if operation.namespace == "c10d":
            self._count_message(operation, args)
        elif launches_kernel(operation):
            self.counts.launch([leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)])
        return out

    def _count_message(self, operation: OpOverload, args: tuple) -> None:
        group = _group_of(operation, args)
        if group.size() == 1:
            return
        name = operation._schema.name.partition("::")[2]
        name = _OPERATIONS.get(name, name.strip("_"))
        sides = [[leaf for leaf in tree_leaves(arg) if isinstance(leaf, Tensor)] for arg in args]
        self._message(name, sum(sides, []))
        size = max(sum(map(distinct_bytes, side)) for side in sides)
        messages = self.counts.messages.setdefault((_AXES.get(group.group_desc, _WORLD), name), Messages())
        messages.count += 1
        messages.bytes += size


def _group_of(operation: OpOverload, args: tuple) -> dist.ProcessGroup:
    """The process group among the arguments of an operation of torch.distributed."""
    types = [str(argument.type) for argument in operation._schema.arguments]
    return dist.ProcessGroup.unbox(args[types.index(_PROCESS_GROUP)])
