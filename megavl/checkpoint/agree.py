"""Ranks that succeed together or fail together.

A rank that raises alone leaves the others waiting in the next collective. Here each phase of a save or a load runs on
every rank, then the ranks tell each other how it went, and all of them raise the same error.

`control` is the gloo group over the world (`Mesh.control`), or None in a process without process groups.
"""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from megavl.parallel.agree import gather_messages

T = TypeVar("T")


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, found, read or used; the message says why and what to do."""


def is_first(control: dist.ProcessGroup | None) -> bool:
    """Whether this process does what is done once: rank 0, or a process without process groups."""
    return control is None or dist.get_rank(control) == 0


def gather(value: T, control: dist.ProcessGroup | None) -> list[T]:
    """`value` of every rank, on every rank, in the order of the ranks. Collective."""
    if control is None:
        return [value]
    values = [None] * dist.get_world_size(control)
    dist.all_gather_object(values, value, group=control)
    return values


def every_rank(action: Callable[[], T], control: dist.ProcessGroup | None) -> T:
    """Run `action`; its result if it succeeded on all ranks. Collective.

    Raises:
        CheckpointError: the same on all ranks, naming the ranks on which `action` failed, and why.
    """
    result, failure, cause = None, None, None
    try:
        result = action()
    except Exception as error:  # whatever it is: a rank that left here would leave the others waiting
        failure = str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
        cause = error
    failures = gather_messages(failure, control)
    if failures:
        raise CheckpointError(_summary(failures)) from cause
    return result


def first_rank(action: Callable[[], None], control: dist.ProcessGroup | None) -> None:
    """Run `action` on rank 0 while the others wait; all raise what it raises. Collective."""
    every_rank(action if is_first(control) else lambda: None, control)


def some(names: list[str]) -> str:
    """A list of names that fits a message."""
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _summary(failures: dict[int, str]) -> str:
    """One message: failures that read the same are said once."""
    ranks_of: dict[str, list[int]] = {}
    for rank, failure in failures.items():
        ranks_of.setdefault(failure, []).append(rank)
    if len(ranks_of) == 1:
        return next(iter(ranks_of))
    shown = [f"rank {ranks[0]}: {failure}" for failure, ranks in list(ranks_of.items())[:4]]
    return "\n".join([*shown, f"... and {len(ranks_of) - 4} other failures"] if len(ranks_of) > 4 else shown)
