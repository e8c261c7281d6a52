"""Times of work on a device."""

import statistics
import time
from collections.abc import Callable

import torch

# Calls of one timing: a CPU does not need many.
_CALLS = {"cuda": 12, "cpu": 1}


def seconds_of(work: Callable[[], object], device: torch.device, calls: int | None = None) -> float:
    """Seconds of one call, the mean of some in a row, after three that are not counted."""
    calls = calls or _CALLS[device.type]
    if device.type != "cuda":
        work()
        started = time.perf_counter()
        for _ in range(calls):
            work()
        return (time.perf_counter() - started) / calls
    for _ in range(3):
        work()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def median_wall_s(work: Callable[[], object], synchronize: Callable[[], None], times: int) -> float:
    """Seconds of one call to the end of its work on the device, the median of `times`."""
    found = []
    for _ in range(times):
        synchronize()
        started = time.perf_counter()
        work()
        synchronize()
        found.append(time.perf_counter() - started)
    return statistics.median(found)
