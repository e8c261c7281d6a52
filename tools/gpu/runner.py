"""The stages one after another, each a process with a time limit; the report is written after every one."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from gpu.files import last_lines, results_path
from gpu.report import DETAILS, write_report
from gpu.results import RESTART, fail_running, read_results
from gpu.stage import LEAST_S, Stage, limit_s

# A stage's name and the folder of the check to the command that runs it.
Command = Callable[[str, Path], Sequence[str]]
_KEPT_LINES = 30
_UNFINISHED, _INTERRUPTED = 3, 130


def check(stages: Sequence[Stage], script: Path, budget_s: float, output: Path, rehearse: bool) -> int:
    """Run the stages and print the report. Returns the exit code: 1 if one failed."""
    accelerator = "cpu" if rehearse else "cuda"
    options = ["--rehearse"] * rehearse

    def command(name: str, work: Path) -> Sequence[str]:
        # `env`: a child is told what to run on, and this process reads no environment.
        variables = (f"DS_ACCELERATOR={accelerator}", "PYTHONUNBUFFERED=1")
        return ["env", *variables, sys.executable, str(script), "--stage", name, "--work", str(work), *options]

    words = ["python", "tools/gpu_check.py", *sys.argv[1:]]
    head = {"date": str(date.today()), "command": " ".join(words), "rehearsal": rehearse}
    code = run_stages(stages, command, budget_s, output, head)
    print(f"\n{(output / 'report.md').read_text(encoding='utf-8').partition(DETAILS)[0]}\nwhole report: {output}")
    return code


def run_stages(stages: Sequence[Stage], command: Command, budget_s: float, output: Path, head: dict[str, Any]) -> int:
    """Run the stages within `budget_s` seconds, writing report.md, report.json and output.txt in `output`.

    Returns the exit code: 0, 1 if a stage failed, 3 if none failed but some did not run, 130 if the user ended it.
    """
    output.mkdir(parents=True, exist_ok=True)
    (output / "output.txt").unlink(missing_ok=True)
    ends = time.monotonic() + budget_s
    rows = [unreached(stage) for stage in stages]
    report = head | {"budget_s": budget_s, "stages": rows}
    write_report(report, output)
    work = Path(tempfile.mkdtemp(prefix="gpu_check_"))
    try:
        for index, stage in enumerate(stages):
            left_s = ends - time.monotonic()
            if left_s < LEAST_S:
                rows[index]["line"] = (
                    f"{max(left_s, 0):.0f} s of {budget_s:.0f} were left, and a stage needs {LEAST_S:.0f}"
                )
                continue
            print(f"{stage.name}: {stage.proves}", flush=True)
            process = Process(stage.name, command(stage.name, work), work)
            try:
                rows[index] |= process.run(limit_s(stage, stages[index + 1 :], left_s))
            except KeyboardInterrupt:
                rows[index] |= process.result("the user ended the check") | {"status": "failed"}
                return _INTERRUPTED
            finally:
                _append_output(output / "output.txt", stage.name, process.log)
                write_report(report, output)
                print(f"{stage.name}: {rows[index]['status']} after {rows[index]['seconds']:.0f} s\n", flush=True)
    finally:
        write_report(report, output)
        shutil.rmtree(work, ignore_errors=True)
    found = {row["status"] for row in rows}
    return 1 if "failed" in found else _UNFINISHED if "not run" in found else 0


def unreached(stage: Stage) -> dict[str, Any]:
    """The row of a stage before it has run."""
    return {
        "name": stage.name,
        "proves": stage.proves,
        "status": "not run",
        "line": "the check ended before",
        "seconds": 0.0,
        "limit_s": None,
        "measurements": [],
        "last_lines": [],
    }


@dataclass
class Process:
    """A stage's process, in a session of its own so that its children end with it."""

    name: str
    command: Sequence[str]
    work: Path

    def __post_init__(self) -> None:
        self.log = self.work / f"{self.name}.log"
        self._started = time.monotonic()
        self._limit_s = 0.0

    def run(self, limit_s: float) -> dict[str, Any]:
        """Run it to its end or its limit; returns its row of the report. A crash fails the measurement under way, and
        the process is started again for the others."""
        self._started, self._limit_s = time.monotonic(), limit_s
        path = results_path(self.work, self.name)
        while True:
            left_s = self._started + limit_s - time.monotonic()
            code = self._run_once(left_s) if left_s > 0 else None
            if code == RESTART:
                continue
            if code == 0:
                return self.result("")
            if code is None:
                return self.result(f"cut at its limit of {limit_s:.0f} s{self._under_way(path)}")
            how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            if fail_running(path, f"ended with {how}; last line: {self._last_line()}") is None:
                return self.result(f"ended with {how}; last line: {self._last_line()}")

    def result(self, failure: str) -> dict[str, Any]:
        """Its row of the report. `failure`: what is wrong with the process itself, "" if nothing."""
        measurements = read_results(results_path(self.work, self.name))["measurements"]
        statuses = {each["status"] for each in measurements}
        if not failure and not measurements:
            failure = f"it recorded nothing; last line: {self._last_line()}"
        status = "skipped" if statuses == {"skipped"} else "passed"
        if failure or "failed" in statuses:
            status = "failed"
        return {
            "status": status,
            "line": failure,
            "seconds": time.monotonic() - self._started,
            "limit_s": self._limit_s,
            "measurements": measurements,
            "last_lines": last_lines(self.log, _KEPT_LINES) if status == "failed" else [],
        }

    def _under_way(self, path: Path) -> str:
        last = f"; last line: {self._last_line()}"
        name = fail_running(path, f"under way at the stage's limit{last}")
        return last if name is None else f" during {name}{last}"

    def _last_line(self) -> str:
        return (last_lines(self.log, 1) or ["(no output)"])[0].strip()

    def _run_once(self, left_s: float) -> int | None:
        """Exit code; None where it was killed at its limit."""
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                self.command,
                cwd=Path(__file__).parents[2],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            return process.wait(left_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            # Also after a normal end: a process that it started may be left.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _append_output(path: Path, name: str, log: Path) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(f"==== {name}\n")
        if log.is_file():
            file.write(log.read_text(encoding="utf-8", errors="replace"))
