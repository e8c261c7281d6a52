"""The tests marked gpu, each file in a pytest process: an error that makes the device unusable costs one file."""

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
    """Measure each file that has tests marked gpu. All start together: imports take most of their time."""
    try:
        import pytest  # noqa: F401
    except ImportError as error:
        raise Skipped(f"pytest does not import: {error}") from error
    files = marked_files(_ROOT)
    # On a CPU all of them are skipped: one file shows that the stage works.
    files = files[:1] if setting.rehearse else files
    started = [(file, *start(file, setting.work / f"pytest_{number}.log")) for number, file in enumerate(files)]
    for file, process, log in started:
        results.measure(file, lambda process=process, log=log: outcome(process, log))


def marked_files(root: Path) -> list[str]:
    """Test files with the mark, the quickest to import first."""
    found = [path for path in sorted((root / "tests").rglob("test_*.py")) if _MARK.search(path.read_text())]
    rooms = ("ops", "model")
    return sorted(
        (str(path.relative_to(root)) for path in found),
        key=lambda name: (rooms.index(name.split("/")[1]) if name.split("/")[1] in rooms else len(rooms), name),
    )


def start(file: str, log: Path) -> tuple[subprocess.Popen, Path]:
    """Start pytest on the tests marked gpu of one file; its output goes to the log."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "--tb=short", file]
    with log.open("w") as output:
        return subprocess.Popen(command, cwd=_ROOT, stdout=output, stderr=subprocess.STDOUT), log


def outcome(process: subprocess.Popen, log: Path) -> Finding:
    """The last line of pytest, and the tests that failed."""
    code = process.wait()
    text = log.read_text(encoding="utf-8", errors="replace")
    print(text, flush=True)
    return judge(text.splitlines(), code)


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
