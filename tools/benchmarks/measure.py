"""Measuring one thing against another on the same machine, in the same run."""

import multiprocessing
import platform
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier
from pathlib import Path


@dataclass(frozen=True)
class Setting:
    """What the command line asks for.

    directory: where the files go
    megabytes: of text
    images:    image files
    workers:   processes
    resume_at: step that a run goes on from
    megatron:  a checkout of Megatron-LM, or None
    """

    directory: Path
    megabytes: float
    images: int
    workers: int
    repetitions: int
    resume_at: int
    megatron: Path | None


@dataclass(frozen=True)
class Timing:
    """Seconds of each repetition of some work, and how much work each was."""

    amount: float
    seconds: tuple[float, ...]

    @property
    def rate(self) -> float:
        """Of the fastest repetition, per second."""
        return self.amount / min(self.seconds)

    def after(self, start: "Timing") -> "Timing":
        """The same without what it costs to begin, which was measured beside it."""
        return Timing(self.amount, tuple(all - first for all, first in zip(self.seconds, start.seconds, strict=True)))


def interleave(repetitions: int, works: dict[str, tuple[float, Callable[[], float]]]) -> dict[str, Timing]:
    """Timings of (amount, work that returns its seconds) by name. They take turns, so that what else the machine does
    falls on all of them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for repetition in range(repetitions):
        for name, (_, work) in works.items():
            seconds[name].append(work())
            print(
                f"  {name}, {repetition + 1} of {repetitions}: {seconds[name][-1]:.2f} s", file=sys.stderr, flush=True
            )
    return {name: Timing(amount, tuple(seconds[name])) for name, (amount, _) in works.items()}


def ratio(subject: Timing, reference: Timing) -> str:
    """How many times as fast the subject is: of the fastest repetitions, and the range over those made in turn."""
    pairs = zip(subject.seconds, reference.seconds, strict=True)
    each = [(subject.amount / one) / (reference.amount / other) for one, other in pairs]
    return f"{subject.rate / reference.rate:.2f} ({min(each):.2f} to {max(each):.2f})"


@dataclass(frozen=True)
class Row:
    """One comparison: what is measured, against what, and the ratio that it is to reach, if any."""

    what: str
    subject: Timing
    against: str
    reference: Timing
    target: str = ""


def table(rows: Sequence[Row], unit: str, shown: Callable[[Timing], str]) -> list[str]:
    """Lines in Markdown. A ratio above 1 is in favour of the subject."""
    return [
        f"| what | {unit} | against | {unit} | times as fast | target |",
        "|---|---|---|---|---|---|",
        *(
            f"| {row.what} | {shown(row.subject)} | {row.against} | {shown(row.reference)} | "
            f"{ratio(row.subject, row.reference)} | {row.target} |"
            for row in rows
        ),
    ]


def wall_s(work: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def race_s(prepare: Callable[..., Callable[[], object]], shares: Sequence[tuple]) -> float:
    """Seconds until the last of several processes has done its work.

    Args:
        prepare: called in each process with its share before the clock starts; gives the work.
        shares: arguments of `prepare`, one tuple for each process.
    """
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(len(shares) + 1)
    processes = [context.Process(target=_racer, args=(barrier, prepare, share), daemon=True) for share in shares]
    for process in processes:
        process.start()
    barrier.wait()
    started = time.perf_counter()
    barrier.wait()
    seconds = time.perf_counter() - started
    for process in processes:
        process.join()
    return seconds


def _racer(barrier: Barrier, prepare: Callable[..., Callable[[], object]], share: tuple) -> None:
    try:
        work = prepare(*share)
        barrier.wait()
        work()
        barrier.wait()
    except BaseException:
        barrier.abort()  # the others, and the one with the clock, wait no longer
        raise


def command_line() -> str:
    """The command as it was typed, without what the deepspeed launcher adds."""
    return shlex.join(["python", *(word for word in sys.argv if not word.startswith("--local_rank"))])


def processor() -> str:
    """How many, and of what kind."""
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return f"{len(names)} x {names[0]}" if names else platform.processor() or platform.machine()
