"""Wall-clock and processor time of this process, and of single calls in it."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch


@dataclass(frozen=True)
class Spent:
    """A reading of the clock, or the difference of two.

    wall_s: wall clock
    cpu_s:  user and system time of all threads of the process
    """

    wall_s: float = 0.0
    cpu_s: float = 0.0

    def __add__(self, other: "Spent") -> "Spent":
        return Spent(self.wall_s + other.wall_s, self.cpu_s + other.cpu_s)

    def __sub__(self, earlier: "Spent") -> "Spent":
        return Spent(self.wall_s - earlier.wall_s, self.cpu_s - earlier.cpu_s)


Read = Callable[[], Spent]


def clock_of(device: torch.device) -> Read:
    """A clock that is read when the work queued on `device` is done."""

    def read() -> Spent:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return Spent(time.perf_counter(), time.process_time())

    return read


class Stopwatch:
    """Sum of the times between `start` and `stop`."""

    def __init__(self, read: Read):
        self.spent, self._read, self._started = Spent(), read, Spent()

    def start(self) -> None:
        """Begin an interval."""
        self._started = self._read()

    def stop(self) -> None:
        """End the interval and add it to `spent`."""
        self.spent += self._read() - self._started


@contextmanager
def timed_method(owner: object, name: str, read: Read) -> Iterator[Stopwatch]:
    """While entered, the stopwatch runs during each call of the method `name` of `owner`."""
    method, watch = getattr(owner, name), Stopwatch(read)

    def timed(*args, **kwargs):
        watch.start()
        try:
            return method(*args, **kwargs)
        finally:
            watch.stop()

    with mock.patch.object(owner, name, timed):
        yield watch
