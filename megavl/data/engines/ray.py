"""Tasks of a Ray cluster. Its nodes need megavl, and the input, the tokenizer and the output under the same paths."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import ray

from megavl.data.errors import DataError

Task = TypeVar("Task")
Result = TypeVar("Result")

# Tasks under way per CPU: enough that the others do not wait while one takes long over its task.
_AHEAD = 16


def run(
    work: Callable[[Task], Result], tasks: Iterable[Task], workers: int, address: str | None = None
) -> Iterator[Result]:
    """Results in the order of the tasks. Only a few tasks per CPU of the cluster are under way.

    Args:
        workers: CPUs of the cluster that is started on this machine where `address` is None.
        address: of a running cluster ("auto" for the one that this machine is a node of).

    Raises:
        DataError: no cluster at that address, or a task was lost with its process more often than Ray repeats it. What
            `work` raises goes through.
    """
    try:
        ray.init(
            address=address,
            num_cpus=None if address else workers,
            include_dashboard=None if address else False,
            log_to_driver=False,
            configure_logging=False,
        )
    except ConnectionError as error:
        raise DataError(f"no Ray cluster at {address} ({error}); check --ray-address, or leave it out") from error
    try:
        call = ray.remote(_call)
        kept = ray.put(work)
        ahead = _AHEAD * int(ray.cluster_resources()["CPU"])
        pending: deque[ray.ObjectRef] = deque()
        for task in tasks:
            pending.append(call.remote(kept, task))
            if len(pending) == ahead:
                yield _get(pending.popleft())
        while pending:
            yield _get(pending.popleft())
    finally:
        ray.shutdown()


def _call(work: Callable[[Task], Result], task: Task) -> Result:
    return work(task)


def _get(reference: "ray.ObjectRef") -> Result:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        raise DataError(f"Ray lost a task ({error}); run the same command again to go on") from error
