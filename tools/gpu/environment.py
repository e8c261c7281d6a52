"""Card, versions, and which kernel serves each operation."""

import platform
import shutil
import subprocess
import sys
from importlib import metadata

from gpu.results import Finding, Results, Setting, Skipped

_NEEDED = ("torch", "deepspeed", "pydantic", "numpy", "PyYAML")
_OPTIONAL = (
    *("triton", "transformers", "flash-attn", "apex", "grouped_gemm", "liger-kernel"),
    *("gigatoken", "sentencepiece", "tokenizers", "pyarrow", "pillow", "tensorboard", "pytest", "ninja"),
)
_TORCH = (2, 11)


def run(setting: Setting, results: Results, subject: str) -> None:
    """Measure what the other stages run on."""
    results.measure("versions", versions)
    results.measure("card", lambda: card(setting))
    results.measure("kernels", lambda: kernels(setting))


def versions() -> Finding:
    """Versions of the packages; a missing one that a stage can do without is named as missing."""
    found = {name: _version(name) for name in (*_NEEDED, *_OPTIONAL)}
    failures = [f"{name} is missing" for name in _NEEDED if found[name] is None]
    if found["torch"] and tuple(map(int, found["torch"].split(".")[:2])) < _TORCH:
        failures.append(f"torch {found['torch']} is older than {'.'.join(map(str, _TORCH))}")
    missing = [name for name in _OPTIONAL if found[name] is None] + [
        name for name in ("nvcc",) if shutil.which(name) is None
    ]
    commit = _output("git", "rev-parse", "--short", "HEAD") or "unknown"
    shown = ", ".join(f"{name} {version}" for name, version in found.items() if version)
    line = f"Python {platform.python_version()}, commit {commit}, {shown}; missing: {', '.join(missing) or 'nothing'}"
    return Finding(line, found | {"python": sys.version, "commit": commit}, failures=failures)


def card(setting: Setting) -> Finding:
    """The device and the memory that is free."""
    if setting.rehearse:
        raise Skipped("not on a CPU")
    import torch

    properties, (free, total) = torch.cuda.get_device_properties(0), torch.cuda.mem_get_info()
    driver = _output("nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader")
    values = {
        "name": properties.name,
        "capability": [properties.major, properties.minor],
        "multiprocessors": properties.multi_processor_count,
        "free_bytes": free,
        "total_bytes": total,
        "cuda": torch.version.cuda,
        "nccl": torch.cuda.nccl.version(),
        "driver": driver,
    }
    return Finding(
        f"{properties.name}, capability {properties.major}.{properties.minor}, "
        f"{properties.multi_processor_count} multiprocessors, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free, "
        f"CUDA {torch.version.cuda}, driver, clock and power limit {driver or 'unknown'}",
        values,
    )


def kernels(setting: Setting) -> Finding:
    """What serves each operation, and why."""
    import torch

    from megavl.ops.dispatch import choose

    lines = choose(torch.device(setting.device)).lines
    return Finding("; ".join(lines), {"lines": lines})


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str:
    """What a command prints, "" where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
