"""Measurements of one stage, written to a file after each so that a crash or a kill loses none."""

import gc
import json
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from gpu.files import replace_text

T = TypeVar("T")
# Exit code of a stage whose device has become unusable: it is started again for its other measurements.
RESTART = 75
_LONGEST = 600
_PROJECT, _PACKAGES = str(Path(__file__).parents[2]), "site-packages"


@dataclass(frozen=True)
class Setting:
    """What a stage runs under.

    rehearse: at tiny size on a CPU
    work:     folder of the check, with the results of earlier stages
    """

    rehearse: bool
    work: Path

    @property
    def device(self) -> str:
        return "cpu" if self.rehearse else "cuda"


@dataclass(frozen=True)
class Table:
    """Details of a measurement, shown below the table of all measurements."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True)
class Finding:
    """What was measured.

    line:     one line for the report
    values:   numbers for the JSON
    tables:   details
    failures: what is wrong; empty if it passed. They precede the line
    """

    line: str
    values: Mapping[str, Any] = field(default_factory=dict)
    tables: Sequence[Table] = ()
    failures: Sequence[str] = ()


class Skipped(Exception):
    """The measurement cannot be made here; the message says why."""


class Abandoned(Exception):
    """A preparation that the other measurements of the stage need has failed, and its failure is recorded."""


class Results:
    """The measurements of a stage by name. A name that is in the file already is not measured again."""

    def __init__(self, path: Path, broken: Callable[[], bool] = lambda: False):
        """broken: whether the device has become unusable, asked after each failure."""
        self._path, self._broken = path, broken
        self.measurements = read_results(path)["measurements"]

    def measure(self, name: str, work: Callable[[], Finding]) -> Mapping[str, Any]:
        """Record what `work` finds, or how it fails; its values, {} if it has none.

        Raises:
            SystemExit: it failed and left the device unusable.
        """
        if known := [each for each in self.measurements if each["name"] == name]:
            return known[0]["values"]
        self._write(running=name)
        try:
            finding = work()
        except Skipped as reason:
            self._record(name, "skipped", Finding(str(reason)))
        except Exception as error:
            self.fail(name, error)
        else:
            self._record(name, "failed" if finding.failures else "passed", finding)
        return self.measurements[-1]["values"]

    def prepare(self, name: str, work: Callable[[], tuple[T, Finding]]) -> T:
        """What `work` makes for other measurements; made again where the stage is started again.

        Raises:
            Abandoned: it failed.
        """
        if any(each["name"] == name and each["status"] != "passed" for each in self.measurements):
            raise Abandoned(name)
        self._write(running=name)
        try:
            made, finding = work()
        except Skipped as reason:
            self._record(name, "skipped", Finding(str(reason)))
        except Exception as error:
            self.fail(name, error)
        else:
            self._record(name, "passed", finding)
            return made
        raise Abandoned(name)

    def fail(self, name: str, error: Exception) -> None:
        """Record that `error` has ended a measurement.

        Raises:
            SystemExit: it left the device unusable.
        """
        print("".join(traceback.format_exception(error)), flush=True)
        last = traceback.format_exception_only(error)[-1].strip().splitlines()
        frames = traceback.extract_tb(error.__traceback__)
        # The innermost frame of the project: those below it are torch's.
        ours = [frame for frame in frames if _PROJECT in frame.filename and _PACKAGES not in frame.filename]
        place = (ours or frames)[-1]
        where = f"{Path(place.filename).name}:{place.lineno}"
        self._record(name, "failed", Finding(f"{last[0] if last else type(error).__name__} ({where})"))
        error.__traceback__ = None  # its frames hold tensors
        gc.collect()
        if self._broken():
            raise SystemExit(RESTART)

    def _record(self, name: str, status: str, finding: Finding) -> None:
        row = {"name": name, "status": status} | asdict(finding)
        row["line"] = "; ".join([*row.pop("failures"), *filter(None, [row["line"]])])[:_LONGEST]
        self.measurements = [each for each in self.measurements if each["name"] != name] + [row]
        print(f"{name}: {status}: {row['line']}", flush=True)
        self._write(running=None)

    def _write(self, running: str | None) -> None:
        replace_text(self._path, json.dumps({"measurements": self.measurements, "running": running}, default=str))


def read_results(path: Path) -> dict[str, Any]:
    """{"measurements": [...], "running": name or None} of a stage, so far."""
    if not path.is_file():
        return {"measurements": [], "running": None}
    return json.loads(path.read_text(encoding="utf-8"))


def fail_running(path: Path, line: str) -> str | None:
    """Record that the measurement under way has failed; its name, or None if there was none."""
    found = read_results(path)
    if (name := found["running"]) is not None:
        row = {"name": name, "status": "failed", "line": line[:_LONGEST], "values": {}, "tables": []}
        replace_text(path, json.dumps({"measurements": [*found["measurements"], row], "running": None}))
    return name
