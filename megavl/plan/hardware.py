"""Memory and peak FLOP/s of devices. Source: NVIDIA's data sheets, dense tensor-core rate without sparsity."""

import re

from megavl.config.run import Device

# GiB that CUDA reports.
_MEMORY_GIB: dict[Device, float] = {"a100-40g": 39.4, "a100-80g": 79.2, "h100": 79.1, "h200": 139.8}
# Share for tensors. CUDA's context, NCCL's buffers and fragments of the allocator take the rest.
_USABLE = 0.9

_PEAK_BF16_FLOPS = (
    (r"\bA100\b", 312e12),
    (r"\bH100 PCIe\b", 756e12),
    (r"\bH[12]00 NVL\b", 835e12),
    (r"\bH100\b", 989e12),
    (r"\bH200\b", 989e12),
)


def usable_bytes(device: Device) -> int:
    """Memory of a device that the tensors of a run can take."""
    return int(_USABLE * _MEMORY_GIB[device] * 2**30)


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a device by its name, e.g. "NVIDIA A100-SXM4-80GB"; None where it is unknown, as it is for a
    CPU and for a slice of a GPU (MIG)."""
    if re.search(r"\bMIG\b", device_name):
        return None
    return next((flops for pattern, flops in _PEAK_BF16_FLOPS if re.search(pattern, device_name)), None)
