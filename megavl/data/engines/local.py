"""Worker processes on this machine."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from typing import TypeVar

from megavl.data.errors import DataError

Task = TypeVar("Task")
Result = TypeVar("Result")

# Tasks under way per worker: enough that the others do not wait while one takes long over its task.
_AHEAD = 16


def run(work: Callable[[Task], Result], tasks: Iterable[Task], workers: int) -> Iterator[Result]:
    """Results in the order of the tasks. Only a few tasks per worker are under way, however many there are.

    The workers end at once when the caller stops in the middle, or is killed. One worker is this process.

    Raises:
        DataError: a worker was killed. What `work` raises goes through.
    """
    if workers == 1:
        yield from map(work, tasks)
        return
    # The other end is in this process alone: closed by it or by its death, it is what the workers listen for.
    listening, held = multiprocessing.Pipe(duplex=False)
    context = multiprocessing.get_context("forkserver")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(listening,))
    pending: deque[Future] = deque()
    try:
        for task in tasks:
            pending.append(pool.submit(work, task))
            if len(pending) == _AHEAD * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BaseException as error:
        held.close()
        if isinstance(error, BrokenProcessPool):
            raise DataError(
                "a worker process died (killed, or out of memory); run again with fewer --workers, or with 1 to see why"
            ) from error
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(listening: connection.Connection) -> None:
    threading.Thread(target=_end_with, args=(listening,), name="end_with_caller", daemon=True).start()
    # Ctrl-C reaches every process of the terminal; the main process alone answers it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _end_with(listening: connection.Connection) -> None:
    connection.wait([listening])
    os._exit(1)
