"""A problem on one rank ends the run on all ranks, with one message."""

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

Result = TypeVar("Result")


class RunError(RuntimeError):
    """The run cannot go on; every rank raises it with the same message."""


def agree(problem: str | None, device: torch.device) -> None:
    """Collective. Raises RunError on every rank when any rank has a problem, before one of them waits for the others.

    problem: what went wrong here, None where all is well
    device: where the ranks exchange the flag
    """
    flag = torch.tensor([problem is not None], dtype=torch.int32, device=device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    if not flag.item():
        return
    problems = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    raise RunError("\n".join(dict.fromkeys(text for text in problems if text is not None)))


def together(action: Callable[[], Result], device: torch.device) -> Result:
    """Collective. Do what may fail on bad input (ValueError, OSError) on some ranks only, and then `agree`."""
    problem, result = None, None
    try:
        result = action()
    except (ValueError, OSError) as error:
        problem = f"{error}"
    agree(problem, device)
    return result
