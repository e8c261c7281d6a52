"""Ranks that fail together: one that raised alone would leave the others waiting in their next collective."""

import torch
import torch.distributed as dist


def problems_of_all(problem: str | None) -> dict[int, str]:
    """What went wrong, by rank; empty where all is well. Collective over the default group, if there is one.

    problem: what went wrong on this rank, None where nothing did

    All is well is said in one number; texts travel only when there are any.
    """
    if not dist.is_initialized():
        return {} if problem is None else {0: problem}
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    flag = torch.tensor([problem is not None], dtype=torch.int32, device=device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    if not flag.item():
        return {}
    problems = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    return {rank: text for rank, text in enumerate(problems) if text is not None}
