"""Files of the check."""

import os
from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """Write a file that is whole whenever it is read."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def results_path(work: Path, stage: str) -> Path:
    """Where a stage keeps its measurements."""
    return work / f"{stage}.json"


def last_lines(path: Path, count: int) -> list[str]:
    """The last lines of a log that are not empty."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return [line for line in lines if line.strip()][-count:]
