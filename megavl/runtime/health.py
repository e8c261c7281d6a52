"""A problem on one rank ends the run on all ranks, with one message."""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from megavl.parallel.agree import gather_messages

Result = TypeVar("Result")
Remark = TypeVar("Remark")


class RunError(RuntimeError):
    """The run cannot go on; every rank raises it with the same message."""


def together(action: Callable[[], Result], control: dist.ProcessGroup | None) -> Result:
    """Run an action that may fail on some ranks only, on bad input (ValueError, OSError). Collective over `control`.

    Raises RunError on every rank when it failed on any, before one of them waits for the others.
    """
    result, _ = together_with_remarks(action, lambda _: None, control)
    return result


def together_with_remarks(
    action: Callable[[], Result], remark: Callable[[Result], Remark | None], control: dist.ProcessGroup | None
) -> tuple[Result, list[Remark]]:
    """`together` with an optional remark of each rank on its result, for all ranks. Collective over `control`.

    Without a failure and a remark it costs what `together` costs: one number. Returns the result of this rank, and the
    remarks of all, in the order of the ranks.
    """
    result, said, problem, cause = None, None, None, None
    try:
        result = action()
        said = remark(result)
    except (ValueError, OSError) as error:
        problem, cause = str(error), error
    heard = gather_messages(None if problem is None and said is None else (problem, said), control).values()
    problems = [problem for problem, _ in heard if problem is not None]
    if problems:
        raise RunError("\n".join(dict.fromkeys(problems))) from cause
    return result, [said for _, said in heard]
