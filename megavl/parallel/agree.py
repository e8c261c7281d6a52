"""Ranks that agree: one that raised alone would leave the others waiting in their next collective."""

from typing import TypeVar

import torch
import torch.distributed as dist

Words = TypeVar("Words")


def said_by_all(words: Words | None) -> dict[int, Words]:
    """What ranks have to say, by rank; empty where nobody says anything. Collective over the default group, if there is
    one.

    words: what this rank has to say, such as what went wrong on it; None for nothing

    That nobody says anything is one number; words travel only when there are any.
    """
    if not dist.is_initialized():
        return {} if words is None else {0: words}
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    flag = torch.tensor([words is not None], dtype=torch.int32, device=device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    if not flag.item():
        return {}
    said: list[Words | None] = [None] * dist.get_world_size()
    dist.all_gather_object(said, words)
    return {rank: theirs for rank, theirs in enumerate(said) if theirs is not None}
