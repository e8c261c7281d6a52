"""A problem on one rank ends the run on all ranks, with one message."""

from collections.abc import Callable
from typing import TypeVar

from megavl.parallel.agree import problems_of_all

Result = TypeVar("Result")


class RunError(RuntimeError):
    """The run cannot go on; every rank raises it with the same message."""


def together(action: Callable[[], Result]) -> Result:
    """Do what may fail on some ranks only, on bad input (ValueError, OSError). Collective.

    Raises RunError on every rank when it failed on any, before one of them waits for the others.
    """
    result, problem, cause = None, None, None
    try:
        result = action()
    except (ValueError, OSError) as error:
        problem, cause = str(error), error
    problems = problems_of_all(problem)
    if problems:
        raise RunError("\n".join(dict.fromkeys(problems.values()))) from cause
    return result
