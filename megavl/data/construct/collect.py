"""Collect: many files through a construction, over worker processes, into one folder.

    OUTPUT/documents.jsonl      a record per sample: its image, then its text
    OUTPUT/images/00000/*.png   the images, by part
    OUTPUT/dropped.tsv          reason, where and detail of everything that was left out

The input is cut into parts by order and size alone. They are made in OUTPUT.partial: images at their place below its
`output`, records in its `parts`, and a part is complete when its records appear there under their name. A killed run
keeps its complete parts, and the same command goes on with the others. OUTPUT appears when all of them are there.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from megavl.data.construct.sample import Construction, Dropped, Sample
from megavl.data.errors import DataError
from megavl.data.worker import end_with_parent

# A part ends with the file that reaches either: enough that starting a browser for it costs little.
_PART_FILES = 64
_PART_BYTES = 64 << 20

_KEPT = "documents.jsonl"
_DROPPED = "dropped.tsv"


@dataclass(frozen=True)
class Summary:
    """Number of samples, and of what was dropped by reason."""

    samples: int
    dropped: Counter[str]

    def __add__(self, other: "Summary") -> "Summary":
        return Summary(self.samples + other.samples, self.dropped + other.dropped)


@dataclass(frozen=True)
class _Part:
    number: int
    paths: tuple[str, ...]


def find(inputs: Sequence[str], suffixes: Sequence[str]) -> list[str]:
    """The files that the inputs name, in order; of a folder all below it that have one of the suffixes, sorted.

    Raises:
        DataError: an input is missing, is of another kind, or nothing is found.
    """
    found = []
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            found += sorted(str(file) for file in path.rglob("*") if file.suffix.lower() in suffixes and file.is_file())
        elif not path.is_file():
            raise DataError(f"{name}: no such file; check --input")
        elif path.suffix.lower() not in suffixes:
            raise DataError(f"{name}: is not {' or '.join(suffixes)}, which is what this reads; check --input")
        else:
            found.append(name)
    if not found:
        raise DataError(f"no {' or '.join(suffixes)} file below {', '.join(inputs)}; check --input")
    return found


def collect(
    construction: Construction,
    paths: Sequence[str],
    output: str,
    workers: int,
    report: Callable[[int, Summary], None],
) -> Summary:
    """Write the samples of the files, in order; the same bytes for any number of workers.

    Args:
        workers: processes; 1 does it in this one.
        report: called after every part with its number of files and the summary so far.

    Raises:
        DataError: the output exists, or a run with other input or options was left unfinished beside it, or a worker
            died. Complete parts are kept for the next run.
    """
    target, partial = Path(output), Path(f"{output}.partial")
    if target.exists():
        raise DataError(f"{target} exists; remove it or choose another --output")
    _begin(partial, construction, paths)
    parts = list(_parts(paths))
    summary = Summary(0, Counter())
    for part in _finished(construction, partial, parts, workers):
        summary += _summary(partial, part)
        report(len(part.paths), summary)
    for name in (_KEPT, _DROPPED):
        with (partial / "output" / name).open("wb") as whole:
            for part in parts:
                with _records(partial, part, name).open("rb") as records:
                    shutil.copyfileobj(records, whole)
    os.replace(partial / "output", target)
    shutil.rmtree(partial)
    return summary


def _begin(partial: Path, construction: Construction, paths: Sequence[str]) -> None:
    """Make the folder of an unfinished run, or take over one of the same construction and files."""
    state = [(path, stat.st_size, stat.st_mtime_ns) for path in paths if (stat := os.stat(path))]
    plan = hashlib.sha256(repr((construction, state)).encode()).hexdigest()
    file = partial / "plan"
    if not file.exists():
        for name in ("parts", "output"):
            (partial / name).mkdir(parents=True, exist_ok=True)
        file.write_text(plan)
    elif file.read_text() != plan:
        raise DataError(
            f"{partial} is of an unfinished run with other input files or options; remove it to begin anew, or repeat "
            "that run's command to finish it"
        )


def _parts(paths: Sequence[str]) -> Iterator[_Part]:
    number, files, size = 0, [], 0
    for path in paths:
        files.append(path)
        size += os.path.getsize(path)
        if len(files) == _PART_FILES or size >= _PART_BYTES:
            yield _Part(number, tuple(files))
            number, files, size = number + 1, [], 0
    if files:
        yield _Part(number, tuple(files))


def _finished(construction: Construction, partial: Path, parts: list[_Part], workers: int) -> Iterator[_Part]:
    """The parts as they are complete, those of an earlier run first."""
    missing = []
    for part in parts:
        if _records(partial, part, _KEPT).exists():
            yield part
        else:
            missing.append(part)
    if workers == 1:
        for part in missing:
            _work(construction, partial, part)
            yield part
        return
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context("forkserver")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    pending: dict[Future, _Part] = {pool.submit(_work, construction, partial, part): part for part in missing}
    try:
        for future in as_completed(pending):
            future.result()
            yield pending[future]
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process died (killed, or out of memory); complete parts are kept. Run again with fewer "
            "--workers, or with 1 to see why"
        ) from error
    except BaseException:
        # Whoever ends this run does not wait for parts that take minutes.
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    end_with_parent()
    # Ctrl-C reaches every process of the terminal; the main process alone answers it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _work(construction: Construction, partial: Path, part: _Part) -> None:
    """Make a part. Its records appear last, and their name is what says that it is complete."""
    output = partial / "output"
    images = output / "images" / f"{part.number:05}"
    shutil.rmtree(images, ignore_errors=True)
    images.mkdir(parents=True)
    documents, dropped = (_records(partial, part, name) for name in (_KEPT, _DROPPED))
    with _open(_temporary(documents)) as kept, _open(_temporary(dropped)) as left_out:
        index = 0
        for item in construction.samples(part.paths):
            if isinstance(item, Dropped):
                fields = (item.reason, item.where, item.detail)
                left_out.write("\t".join(" ".join(field.split()) for field in fields) + "\n")
            else:
                image = images / f"{index:05}{item.suffix}"
                image.write_bytes(item.image)
                kept.write(json.dumps(_record(item, image.relative_to(output)), ensure_ascii=False) + "\n")
                index += 1
    for path in (dropped, documents):
        os.replace(_temporary(path), path)


def _open(path: Path) -> TextIO:
    """For writing. A file name's bytes that are not UTF-8 become `\\udc..`, which JSON reads as they were."""
    return path.open("w", encoding="utf-8", errors="backslashreplace", newline="\n")


def _record(sample: Sample, image: Path) -> dict:
    return {"id": sample.key, "segments": [{"image": image.as_posix()}, {"text": sample.text}]}


def _summary(partial: Path, part: _Part) -> Summary:
    with _records(partial, part, _KEPT).open("rb") as lines:
        samples = sum(1 for _ in lines)
    with _records(partial, part, _DROPPED).open(encoding="utf-8") as lines:
        return Summary(samples, Counter(line.split("\t")[0] for line in lines))


def _records(partial: Path, part: _Part, name: str) -> Path:
    return partial / "parts" / f"{part.number:05}.{name}"


def _temporary(path: Path) -> Path:
    return path.with_name(f"{path.name}.tmp")
