"""Circumstances of a measurement, and its results as one JSON object."""

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from benchmarks.measure import command_line, processor

from megavl import __version__

_ROOT = Path(__file__).parents[2]


def circumstances(device: torch.device) -> dict[str, Any]:
    """Command, date (UTC), commit, machine and versions. `load_average` is that of the last minute before."""
    return {
        "command": command_line(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "versions": {"python": platform.python_version(), "megavl": __version__, "torch": torch.__version__}
        | {name: _version(name) for name in ("deepspeed", "transformers")},
    }


def heading(found: dict[str, Any]) -> str:
    """The circumstances in Markdown."""
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items() if number)
    return (
        f"{found['date']}, {found['device']}, {found['threads']} threads a process, load average "
        f"{found['load_average']:.1f}, commit {found['commit'] or 'unknown'}, {versions}: `{found['command']}`"
    )


def write_json(path: Path, found: dict[str, Any]) -> None:
    """Write the object; the file is whole as soon as it has its name."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def _commit() -> str | None:
    """Abbreviated commit of the checkout, with -dirty where files differ from it; None without git."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=_ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
