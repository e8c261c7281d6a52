"""CUDA devices of this process, counted without torch, whose import takes seconds."""

import ctypes
from pathlib import Path


def cuda_devices() -> int:
    """How many CUDA devices the driver shows; where its library is not found, how many device files there are."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return len(list(Path("/dev").glob("nvidia[0-9]*")))
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return 0
    return count.value
