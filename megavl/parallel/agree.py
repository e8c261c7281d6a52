"""Agreement between ranks: a rank that raises alone leaves the others waiting in their next collective."""

from typing import TypeVar

import torch
import torch.distributed as dist

Message = TypeVar("Message")


def gather_messages(message: Message | None, control: dist.ProcessGroup | None) -> dict[int, Message]:
    """All-gather of optional messages, keyed by rank; costs one flag all-reduce when there are none. Collective.

    Args:
        message: of this rank, such as an error; None for no message
        control: gloo group over the world (`Mesh.control`); None for a process without process groups
    """
    if control is None:
        return {} if message is None else {0: message}
    flag = torch.tensor([message is not None], dtype=torch.int32)
    dist.all_reduce(flag, dist.ReduceOp.MAX, group=control)
    if not flag.item():
        return {}
    messages: list[Message | None] = [None] * dist.get_world_size(control)
    dist.all_gather_object(messages, message, group=control)
    return {rank: theirs for rank, theirs in enumerate(messages) if theirs is not None}
