"""Trial of fused kernels at start: each runs on the shapes of the run against its reference, and the faster one serves.

A kernel that is wrong on one kind of GPU, or with one version of its compiler, must not train a model, and one that is
slower than torch need not. Results are kept in a folder, so the next run with the same shapes measures nothing.
"""

import hashlib
import json
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megavl.ops.candidates import REFERENCE

# Seconds of a call on the device.
Clock = Callable[[Callable[[], object]], float]

_REPETITIONS = 5
# Written before each call that is timed. It takes longer than the host needs to launch the call, and leaves nothing of
# its operands in the cache of the device.
_FILLER_BYTES = 2**30
# A candidate may be this much further from the result in fp32 than the reference is, which rounds more often: both the
# largest and the mean difference. The second number, relative to the result itself, is for values that neither rounds.
_MORE_ERROR, _RELATIVE = 2.0, 1e-5


@dataclass(frozen=True)
class Case:
    """One use of an op, forward and backward.

    shapes: in words
    make:   operands on a device, the same at every call
    run:    (implementation, operands) -> outputs and gradients. It may overwrite the operands
    """

    shapes: str
    make: Callable[[torch.device], list[Tensor]]
    run: Callable[[Any, list[Tensor]], list[Tensor]]


@dataclass(frozen=True)
class Result:
    """What came of the trial of one candidate.

    seconds: median of a forward and a backward pass; None if it raised
    fault:   why it must not serve; None if it may
    """

    name: str
    seconds: float | None
    fault: str | None = None


# Results of each op, in the order of preference.
Results = Mapping[str, Sequence[Result]]


def cuda_seconds(call: Callable[[], object]) -> float:
    """Median time of a call on the current CUDA device, after one that compiles and warms up."""
    call()
    filler = torch.empty(_FILLER_BYTES, dtype=torch.int8, device="cuda")
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(_REPETITIONS)]
    for start, end in events:
        filler.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3


def _widened(operands: list[Tensor]) -> list[Tensor]:
    return [x.float() if x.is_floating_point() else x for x in operands]


def _difference(found: list[Tensor], reference: list[Tensor], exact: list[Tensor]) -> str | None:
    """Where a candidate is further from the exact result than the reference's own rounding explains."""
    for index, (ours, theirs, value) in enumerate(zip(found, reference, exact, strict=True)):
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            shapes = f"{tuple(ours.shape)} of {ours.dtype}, not {tuple(theirs.shape)} of {theirs.dtype}"
            return f"result {index} is {shapes}"
        off, rounding = (ours.float() - value).abs(), (theirs.float() - value).abs()
        for words, measure in (("at most", torch.amax), ("in the mean", torch.mean)):
            size, error = measure(value.abs()).item(), measure(off).item()
            allowed = _MORE_ERROR * measure(rounding).item() + _RELATIVE * size
            if not error <= allowed:  # NaN is a difference too
                return f"result {index} is off by {error:.2g} {words}, allowed are {allowed:.2g}"
    return None


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]:.120}"


def compare(case: Case, implementations: Mapping[str, Any], device: torch.device, clock: Clock) -> list[Result]:
    """Results of the implementations; the reference must be among them.

    An implementation that raises is a result too: a kernel may fail to compile, and the run goes on without it.
    """

    def timed(name: str) -> float:
        operands = case.make(device)
        return clock(lambda: case.run(implementations[name], operands))

    try:
        exact = case.run(implementations[REFERENCE], _widened(case.make(device)))
        reference = case.run(implementations[REFERENCE], case.make(device))
    except Exception as error:  # any: for want of memory, for example; the run then takes the reference
        return [Result(name, None, f"the reference cannot be tried: {_short(error)}") for name in implementations]
    results = []
    for name, implementation in implementations.items():
        try:
            fault = None
            if name != REFERENCE:
                fault = _difference(case.run(implementation, case.make(device)), reference, exact)
            results.append(Result(name, timed(name), fault))
        except Exception as error:  # any: Triton, its compiler and CUDA have their own
            results.append(Result(name, None, _short(error)))
    return results


def _sources() -> str:
    """Digest of this package: a changed kernel or case is tried again."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Trial:
    """The trial of a run.

    cases:    by op; ops without a case are not tried
    device:   of this process
    machine:  name of the device, versions of torch and Triton: results hold for one of them
    folder:   where results are kept; None keeps none
    clock:    seconds of a call
    measures: whether this process measures, rather than waits for the results of one that does
    share:    collective; gets the results of this process, or None where it does not measure, and returns those of the
              process that measures for it
    """

    cases: Mapping[str, Case]
    device: torch.device
    machine: str
    folder: Path | None
    clock: Clock = cuda_seconds
    measures: bool = True
    share: Callable[[Results | None], Results] = lambda results: results

    def __call__(self, implementations: Mapping[str, Mapping[str, Any]], parts: Sequence[str] = ()) -> Results:
        """Results by op. Collective.

        Args:
            implementations: by op, the candidates that are available here, by name; at least the reference is
            parts: names of other ops' candidates that these are made of; kept results hold for the same ones
        """
        mine = None
        if self.measures:
            mine = {op: self._results(op, those, parts) for op, those in implementations.items() if op in self.cases}
            if self.device.type == "cuda":
                torch.cuda.empty_cache()  # the model gets the memory that the operands took
        return self.share(mine)

    def _results(self, op: str, implementations: Mapping[str, Any], parts: Sequence[str]) -> list[Result]:
        if set(implementations) == {REFERENCE}:
            return [Result(REFERENCE, None)]
        case = self.cases[op]
        key = [self.machine, op, case.shapes, list(implementations), list(parts), _sources()]
        kept = self._read(key)
        if kept is not None:
            return kept
        results = compare(case, implementations, self.device, self.clock)
        # A kernel that could not run, for want of a compiler or of memory, is tried again by the next run.
        if all(result.seconds is not None for result in results):
            self._write(key, results)
        return results

    def _path(self, key: list) -> Path:
        return self.folder / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]}.json"

    def _read(self, key: list) -> list[Result] | None:
        if self.folder is None:
            return None
        try:
            kept = json.loads(self._path(key).read_text())
            return [Result(**result) for result in kept["results"]] if kept["key"] == key else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _write(self, key: list, results: list[Result]) -> None:
        """A file for each key, renamed into place: nodes with a common home folder do not disturb one another."""
        if self.folder is None:
            return
        with suppress(OSError):  # a folder that cannot be written costs the next run a minute, not this one its start
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self._path(key)
            unfinished = path.with_suffix(f".{os.getpid()}")
            unfinished.write_text(json.dumps({"key": key, "results": [asdict(result) for result in results]}))
            unfinished.replace(path)


def machine(device: torch.device) -> str:
    """What a timing depends on beside the shapes, of a CUDA device."""
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = None
    return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, triton {triton}"
