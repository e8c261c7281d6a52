"""What the devices can do at most. Source: NVIDIA's data sheets, dense tensor-core rate without sparsity."""

import re

_PEAK_BF16_FLOPS = (
    (r"\bA100\b", 312e12),
    (r"\bH100 PCIe\b", 756e12),
    (r"\bH[12]00 NVL\b", 835e12),
    (r"\bH100\b", 989e12),
    (r"\bH200\b", 989e12),
)


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a device by its name, e.g. "NVIDIA A100-SXM4-80GB"; None where it is unknown, as it is for a
    CPU and for a slice of a GPU (MIG)."""
    if re.search(r"\bMIG\b", device_name):
        return None
    return next((flops for pattern, flops in _PEAK_BF16_FLOPS if re.search(pattern, device_name)), None)
