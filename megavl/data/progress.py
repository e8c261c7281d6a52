"""Progress of long work, on standard error: a bar on a terminal, a line every ten seconds elsewhere."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

_SILENCE_S = 10.0


class ProgressBar:
    """How much of some work is done, at which rate, and how long the rest takes; a context manager."""

    def __init__(self, label: str, total: int, unit: str) -> None:
        """Nothing is shown before the `with` block is entered.

        Args:
            total: amount of the whole work, in `unit`.
            unit: "bytes", which are shown with prefixes (1.2 GB), or what is counted, such as "documents".
        """
        self._label, self._total, self._unit = label, total, unit
        self._done, self._note = 0, ""
        self._terminal = sys.stderr.isatty()

    def advance(self, amount: int, note: str = "") -> None:
        """So much more is done. `note` is shown behind it, such as what was counted on the way."""
        self._done, self._note = self._done + amount, note
        if self._terminal:
            self._bar.update(self._task, completed=self._done, note=note)
        elif time.monotonic() >= self._next:
            self._next = time.monotonic() + _SILENCE_S
            print(self._line(), file=sys.stderr, flush=True)

    def leave_out(self, amount: int) -> None:
        """So much of the whole need not be done after all: it counts neither as done nor for the rate."""
        self._total -= amount
        if self._terminal:
            self._bar.update(self._task, total=self._total)

    @property
    def elapsed_s(self) -> float:
        """Since the `with` block was entered."""
        return time.monotonic() - self._start

    def __enter__(self) -> "ProgressBar":
        self._start = time.monotonic()
        self._next = self._start + _SILENCE_S
        if self._terminal:
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TaskProgressColumn(),
                _Rate(self._unit),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}", markup=False),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task(self._label, total=self._total, note="")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._terminal:
            self._bar.stop()

    def _line(self) -> str:
        speed = self._done / self.elapsed_s
        left_s = (self._total - self._done) / speed if speed else float("inf")
        share = self._done / self._total if self._total else 1.0
        words = [f"{self._label}: {share:.0%}", rate(speed, self._unit), f"{_duration(left_s)} left", self._note]
        return ", ".join(filter(None, words))


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        """Since the start once the work is finished, over the last seconds before."""
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else rate(speed, self._unit), style="progress.data.speed")


def rate(speed: float, unit: str) -> str:
    """1234567.8, "bytes" -> "1.2 MB/s"; 1234.5, "documents" -> "1,234 documents/s"."""
    return f"{size(speed)}/s" if unit == "bytes" else f"{speed:,.0f} {unit}/s"


def size(size_bytes: float) -> str:
    """1234567 -> "1.2 MB", by powers of 1000."""
    for prefix in ("", "k", "M", "G", "T"):
        if size_bytes < 1000 or prefix == "T":
            break
        size_bytes /= 1000
    return f"{size_bytes:,.1f} {prefix}B" if prefix else f"{size_bytes:,.0f} B"


def _duration(left_s: float) -> str:
    if left_s == float("inf"):
        return "unknown time"
    minutes, seconds = divmod(round(left_s), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
