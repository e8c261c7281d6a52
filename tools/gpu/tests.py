"""The tests marked gpu, one pytest process for each file: an error that ends the use of a device costs one file."""

import re
import subprocess
import sys
from pathlib import Path

from gpu.results import Finding, Results, Setting, Skipped, Table

_ROOT = Path(__file__).parents[2]
_MARK = re.compile(r"mark\.gpu\b")
_PASSED = re.compile(r"\d+ (passed|failed)")
_MISSING = re.compile(r"No module named '([\w.]+)'")
_OURS = ("megavl", "tests")


def run(setting: Setting, results: Results, subject: str) -> None:
    """Measure each file that has tests marked gpu."""
    files = marked_files(_ROOT)
    # On a CPU all of them are skipped: one file shows that the stage works.
    for file in files[:1] if setting.rehearse else files:
        results.measure(file, lambda file=file: outcome(file))


def marked_files(root: Path) -> list[str]:
    """Test files with the mark, the quickest to import first."""
    found = [path for path in sorted((root / "tests").rglob("test_*.py")) if _MARK.search(path.read_text())]
    rooms = ("ops", "model")
    return sorted(
        (str(path.relative_to(root)) for path in found),
        key=lambda name: (rooms.index(name.split("/")[1]) if name.split("/")[1] in rooms else len(rooms), name),
    )


def outcome(file: str) -> Finding:
    """The last line of pytest, and the tests that failed."""
    try:
        import pytest  # noqa: F401
    except ImportError as error:
        raise Skipped(f"pytest does not import: {error}") from error
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "--tb=short", file]
    done = subprocess.run(command, cwd=_ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout, flush=True)
    return judge(done.stdout.splitlines(), done.returncode)


def judge(lines: list[str], code: int) -> Finding:
    """What pytest's output says."""
    last = next((line.strip("= ") for line in reversed(lines) if line.strip()), "(no output)")
    failed = [line for line in lines if line.startswith(("FAILED ", "ERROR "))]
    skipped = [line for line in lines if line.startswith("SKIPPED ")]
    tables = [
        Table(title, (title,), [(line,) for line in found])
        for title, found in (("failed", failed), ("skipped", skipped))
        if found
    ]
    missing = [found for line in lines for found in _MISSING.findall(line) if not found.startswith(_OURS)]
    if code and missing and not _PASSED.search(last):
        raise Skipped(f"{missing[0]} is not installed")
    failures = [] if code == 0 else [failed[0] if failed else f"pytest ended with exit code {code}"]
    if not failures and not _PASSED.search(last):
        raise Skipped(last)
    return Finding(last, {"exit_code": code}, tables, failures)
