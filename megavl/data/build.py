"""Build: input files to a dataset. Shards of the input are encoded independently, each by one process, and merged."""

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict
from functools import partial
from itertools import tee
from pathlib import Path

from megavl.data.engines import local
from megavl.data.errors import DataError
from megavl.data.lock import locked
from megavl.data.merge import merge
from megavl.data.output import refuse_existing
from megavl.data.progress import ProgressBar, rate, size
from megavl.data.readers.reader import Part, ReadOptions
from megavl.data.readers.registry import input_files, reader_of
from megavl.data.shard import Counts, EncodeShard, Shard, too_many_bad
from megavl.data.tokenizer import load_tokenizer

# Runs the work on shards, in whatever processes, and gives the counts in the order of the shards. It takes shards as it
# needs them: there may be many.
Engine = Callable[[Callable[[Shard], Counts], Iterable[Shard]], Iterator[Counts]]

# Input in a shard: so little that all processes are busy to the end, so much that starting on one costs nothing.
_SHARDS, _LEAST_BYTES, _MOST_BYTES = 1024, 8 << 20, 256 << 20
_THIS_PROCESS: Engine = partial(local.run, workers=1)
# Changes with what a shard is made of, so that one that an older release left behind is not used.
_VERSION = 2


def build(
    paths: Sequence[str],
    prefix: str,
    tokenizer_path: str,
    *,
    engine: Engine = _THIS_PROCESS,
    options: ReadOptions | None = None,
    part_bytes: int | None = None,
    max_bad: int = 0,
    overwrite: bool = False,
    plain_tokenizer: bool = False,
) -> Counts:
    """Write the documents of files and folders, in order, as one dataset; the same bytes with every engine.

    Finished shards are kept in `<prefix>.parts` until the dataset is whole: after an error or a kill, the same call
    does the others only. Memory does not grow with the input.

    Args:
        options: of the readers; their defaults if None.
        part_bytes: input in a shard; if None, it follows from the size of the input.
        max_bad: bad records that are left out, and written to `<prefix>.rejected.jsonl`; one more ends the run.
        plain_tokenizer: leave tokenising to the tokenizer's own package, also where gigatoken gives the same ids.

    Raises:
        DataError: a bad record too many, an input that cannot be read or is given twice, no document at all, an output
            that exists, or another process that builds it.
    """
    if not overwrite:
        refuse_existing(prefix)
    files = input_files(paths)
    _refuse_repeated(files)
    options = options or ReadOptions()
    work = EncodeShard(tokenizer_path, options, max_bad, plain_tokenizer)
    made_by = [_VERSION, load_tokenizer(tokenizer_path).identity, plain_tokenizer, asdict(options)]
    input_bytes = sum(os.path.getsize(path) for path in files)
    with _directory(prefix) as directory:
        # The engine is ahead by the shards that are under way.
        shards, started = tee(_shards(files, part_bytes or shard_bytes(input_bytes), made_by, directory))
        total, prefixes, rejected = Counts(), [], []
        with ProgressBar("encoding", input_bytes, "bytes") as bar, closing(engine(work, started)) as results:
            for counts, shard in zip(results, shards, strict=False):
                total += counts
                if counts.documents:
                    prefixes.append(shard.prefix)
                if counts.rejected:
                    rejected.append(shard.rejected)
                if total.rejected > max_bad:
                    raise too_many_bad(shard.last_rejected(), max_bad)
                bar.leave_out(counts.reused_bytes)
                bar.advance(counts.input_bytes - counts.reused_bytes, _note(total, bar.elapsed_s))
        if not prefixes:
            _remove(directory, "*")
            raise DataError(f"{', '.join(paths)}: there is no document in the input; an empty dataset cannot be read")
        _write_rejected(prefix, rejected)
        merge(prefixes, prefix, overwrite=True, consume=True)
        _remove(directory, "*")
    return total


def shard_bytes(input_bytes: int) -> int:
    """Input in a shard: a power of two, so that finished shards are of use, too, after the input has grown a little."""
    return min(max(_LEAST_BYTES, 1 << (input_bytes // _SHARDS).bit_length()), _MOST_BYTES)


def _note(total: Counts, elapsed_s: float) -> str:
    words = [f"{total.documents:,} documents", rate(total.documents / elapsed_s, "documents")]
    if total.images:
        words.append(f"{size(total.image_bytes)} of images")
    if total.rejected:
        words.append(f"{total.rejected:,} rejected")
    return ", ".join(words)


def _shards(files: Iterable[str], part_bytes: int, made_by: list, directory: Path) -> Iterator[Shard]:
    for parts in _groups(files, part_bytes):
        read = [(part.path, part.start, part.stop, os.stat(part.path)) for part in parts]
        stamp = [(path, start, stop, stat.st_size, stat.st_mtime_ns) for path, start, stop, stat in read]
        fingerprint = hashlib.sha256(json.dumps([made_by, stamp]).encode()).hexdigest()
        yield Shard(str(directory / fingerprint), parts)


def _groups(files: Iterable[str], part_bytes: int) -> Iterator[tuple[Part, ...]]:
    """Consecutive parts that are `part_bytes` together: many small files are one shard."""
    group: list[Part] = []
    size = 0
    for path in files:
        for part in reader_of(path).split(path, part_bytes):
            if group and size + part.size_bytes > part_bytes:
                yield tuple(group)
                group, size = [], 0
            group.append(part)
            size += part.size_bytes
    if group:
        yield tuple(group)


def _refuse_repeated(files: Sequence[str]) -> None:
    [(path, times)] = Counter(files).most_common(1)
    if times > 1:
        raise DataError(
            f"{path} is {times} times in the input, and its documents would be, too; to train on them more often, give "
            "the dataset a larger weight"
        )


@contextmanager
def _directory(prefix: str) -> Iterator[Path]:
    """The directory of finished shards, which goes when there are none. One process at a time."""
    directory = Path(f"{prefix}.parts")
    try:
        with locked(directory / "lock", f"{prefix} is being built"):
            # Left by processes that were killed: by the end of an earlier run, or now by this one.
            _remove(directory, "*.tmp")
            try:
                yield directory
            finally:
                _remove(directory, "*.tmp")
    finally:
        with suppress(OSError):
            directory.rmdir()


def _remove(directory: Path, pattern: str) -> None:
    for path in directory.glob(pattern):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)


def _write_rejected(prefix: str, files: Sequence[str]) -> None:
    path = Path(f"{prefix}.rejected.jsonl")
    # One of an older dataset would be taken for this one's.
    path.unlink(missing_ok=True)
    if not files:
        return
    temporary = Path(f"{path}.tmp")
    with temporary.open("wb") as sink:
        for name in files:
            with open(name, "rb") as source:
                shutil.copyfileobj(source, sink)
    temporary.rename(path)
