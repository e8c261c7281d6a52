"""Places where the host waits for the device."""

import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch


def waits_of(work: Callable[[], object]) -> Counter[str]:
    """How often each line of Python makes the host wait while `work` runs, by torch's CUDA sync debug mode."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return places(caught)


def places(caught: list[warnings.WarningMessage]) -> Counter[str]:
    """Count the warnings of synchronising operations by file and line."""
    return Counter(
        f"{'/'.join(Path(each.filename).parts[-3:])}:{each.lineno}"
        for each in caught
        if "called a synchronizing" in str(each.message)
    )
