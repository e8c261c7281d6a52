"""Agreement between ranks: they succeed together or fail together.

A rank that raises alone leaves the others waiting in their next collective. Here every rank runs an action, the ranks
exchange what went wrong, and all of them raise the same error.

`control` is the gloo group over the world (`Mesh.control`), or None in a process without process groups. While nothing
goes wrong an agreement costs one all-reduce of one number.
"""

import sys
import traceback
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

Result = TypeVar("Result")
Message = TypeVar("Message")

# Different failures that one message shows.
_SHOWN = 4


class RunError(RuntimeError):
    """The run cannot go on; every rank raises it with the same message."""


def on_every_rank(
    action: Callable[[], Result], control: dist.ProcessGroup | None, error_type: type[Exception] = RunError
) -> Result:
    """Run `action`; return its result if it succeeded on all ranks. Collective.

    Bad input (ValueError, OSError) gives its own message. Any other exception is a defect: its type is in the message,
    and its traceback is printed on the rank where it occurred.

    Args:
        action: without collectives, or with collectives that end on all ranks when one fails
        control: see the module
        error_type: of the exception that all ranks raise

    Raises:
        Exception: of the type `error_type`, on all ranks with the same message, if `action` raised on any.
    """
    result, _ = on_every_rank_with_notes(action, lambda _: None, control, error_type)
    return result


def on_every_rank_with_notes(
    action: Callable[[], Result],
    note: Callable[[Result], Message | None],
    control: dist.ProcessGroup | None,
    error_type: type[Exception] = RunError,
) -> tuple[Result, list[Message]]:
    """`on_every_rank` that also exchanges an optional note of each rank on its result. Collective.

    Returns:
        The result of this rank, and the notes of all ranks in their order.
    """
    result, own_note, failure, cause = None, None, None, None
    try:
        result = action()
        own_note = note(result)
    except Exception as error:  # any: a rank that left here would leave the others waiting
        failure, cause = _described(error, error_type), error
    messages = _gather_messages(None if failure is None and own_note is None else (failure, own_note), control)
    failures = {rank: theirs for rank, (theirs, _) in messages.items() if theirs is not None}
    if failures:
        raise error_type(_summary(failures)) from cause
    return result, [theirs for _, theirs in messages.values()]


def on_first_rank(
    action: Callable[[], None], control: dist.ProcessGroup | None, error_type: type[Exception] = RunError
) -> None:
    """Run `action` on rank 0 while the others wait; all raise if it raises. Collective."""
    on_every_rank(action if is_first(control) else lambda: None, control, error_type)


def is_first(control: dist.ProcessGroup | None) -> bool:
    """Whether this process does what is done once: rank 0, or a process without process groups."""
    return control is None or dist.get_rank(control) == 0


def gather(value: Message, control: dist.ProcessGroup | None) -> list[Message]:
    """`value` of every rank, on every rank, in the order of the ranks. Collective."""
    if control is None:
        return [value]
    values = [None] * dist.get_world_size(control)
    dist.all_gather_object(values, value, group=control)
    return values


def _gather_messages(message: Message | None, control: dist.ProcessGroup | None) -> dict[int, Message]:
    """All-gather of optional messages, keyed by rank; one all-reduce of a flag if there are none. Collective."""
    if control is not None:
        flag = torch.tensor([message is not None], dtype=torch.int32)
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=control)
        if not flag.item():
            return {}
    return {rank: theirs for rank, theirs in enumerate(gather(message, control)) if theirs is not None}


def _described(error: Exception, error_type: type[Exception]) -> str:
    """The message of an exception; the traceback of a defect goes to the console of its rank."""
    bad_input = isinstance(error, (ValueError, OSError, error_type))
    # Libraries raise a plain ValueError for defects too.
    if not bad_input or type(error) is ValueError:
        traceback.print_exception(error, file=sys.stderr)
    return str(error) if bad_input else f"{type(error).__name__}: {error}"


def _summary(failures: dict[int, str]) -> str:
    """One message: equal failures once, different ones with their first rank."""
    first_rank: dict[str, int] = {}
    for rank, failure in failures.items():
        first_rank.setdefault(failure, rank)
    if len(first_rank) == 1:
        return next(iter(first_rank))
    lines = [f"rank {rank}: {failure}" for failure, rank in first_rank.items()]
    more = len(lines) - _SHOWN
    return "\n".join([*lines[:_SHOWN], f"... and {more} other failures"] if more > 0 else lines)
