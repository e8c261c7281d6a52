"""Verification of a dataset: every file read whole, every entry checked, everything that is wrong listed.

The work is cut into parts of bounded size, which worker processes take one after another.
"""

import contextlib
import multiprocessing
import os
import signal
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache, partial
from typing import Literal, NamedTuple

import numpy as np

from megavl.data.checksum import Checksum
from megavl.data.errors import DataError
from megavl.data.format import IMAGE
from megavl.data.store import Store
from megavl.data.verify.found import Found, InOrder
from megavl.data.verify.images import check_images, check_rows
from megavl.data.verify.index import check_documents, check_sequences
from megavl.data.verify.keys import check_keys
from megavl.data.verify.tokenizer import check_tokenizer
from megavl.data.verify.tokens import check_tokens
from megavl.data.worker import end_with_parent

Images = Literal["all", "sample", "none"]

# Entries of the index that are one part of the work; so are documents of so many bytes, or as many documents.
_ENTRIES = 1 << 20
_DOCUMENTS = 1 << 14
_BYTES = 1 << 25
# Parts that worker processes have, or that wait for one.
_UNDER_WAY = 256
# A sample of the images is those of one document in so many.
_SAMPLE = 16


class _Part(NamedTuple):
    """A part of a check: `work` is called with the dataset and what to fill, and reads `size_bytes` of the files."""

    check: str
    work: Callable[..., None]
    size_bytes: int


def work_bytes(store: Store) -> int:
    """What `verify` reports of a dataset whose index is sound, all calls together; rounded."""
    bin_bytes, idx_bytes, meta_bytes = (os.path.getsize(path) for path in store.paths)
    return 2 * bin_bytes + 2 * idx_bytes + meta_bytes


def verify(
    store: Store, tokenizer: str | None, images: Images, workers: int, report: Callable[[int], None]
) -> dict[str, Found]:
    """Check a dataset whole. What each check found: "checksums", "index", "keys", "tokens", "images", "tokenizer".

    Keys that are repeated are no damage. Where the index is wrong, the checks that follow it are left out; otherwise
    each goes on whatever another finds.

    Args:
        tokenizer: file of the tokenizer that made it; None leaves that check out.
        images: decode all, those of one document in 16, or none.
        workers: processes; 1 works in this one.
        report: called with the bytes that were read since the last call.

    Raises:
        DataError: a worker process died.
    """
    findings: dict[str, Found] = {}
    with _workers(workers) as pool:
        for parts in (_files(store), _contents(store, tokenizer, images)):
            found: defaultdict[str, InOrder] = defaultdict(InOrder)
            for number, part, result in _map(store, parts, pool):
                found[part.check].add(number, result)
                report(part.size_bytes)
            findings |= {check: parts.together() for check, parts in found.items()}
            if findings["index"].count:
                break
    return findings


def _files(store: Store) -> Iterator[_Part]:
    """The files as such: checksums, and the entries of the index."""
    idx_bytes = os.path.getsize(store.paths.idx)
    for checksum in (Checksum(store.paths.idx, 0, idx_bytes, store.meta.idx_sha256), *store.checksums()):
        yield _Part("checksums", partial(_check_bytes, checksum=checksum), checksum.size_bytes)
    sequences, documents = len(store.lengths), len(store)
    # The bytes of the index are shared out among its entries.
    entry_bytes = idx_bytes / (sequences + documents)
    for size, check in ((sequences, check_sequences), (documents, check_documents)):
        for first in range(0, size, _ENTRIES):
            stop = min(first + _ENTRIES, size)
            yield _Part("index", partial(check, first=first, stop=stop), round((stop - first) * entry_bytes))


def _contents(store: Store, tokenizer: str | None, images: Images) -> Iterator[_Part]:
    """What the index leads to. The longest part comes first, so that the others run beside it."""
    yield _Part("keys", check_keys, os.path.getsize(store.paths.meta))
    if tokenizer is not None:
        yield _Part("tokenizer", partial(check_tokenizer, path=tokenizer), 0)
    for first, stop in _blocks(store):
        begin, end = store.documents[[first, stop]].tolist()
        is_image, lengths = store.modes[begin:end] == IMAGE, store.lengths[begin:end].astype(np.int64)
        image_bytes, all_bytes = (int(part.sum()) * store.dtype.itemsize for part in (lengths[is_image], lengths))
        yield _Part("tokens", partial(check_tokens, first=begin, stop=end), all_bytes - image_bytes)
        yield _Part("images", partial(check_rows, first=first, stop=stop), 0)
        if images != "none" and is_image.any():
            every = 1 if images == "all" else _SAMPLE
            yield _Part("images", partial(check_images, first=first, stop=stop, every=every), image_bytes)


def _blocks(store: Store) -> Iterator[tuple[int, int]]:
    """Ranges of documents of about equal work."""
    for first in range(0, len(store), _DOCUMENTS):
        stop = min(first + _DOCUMENTS, len(store))
        places = store.pointers[store.documents[first:stop]] // _BYTES
        borders = (first + 1 + np.flatnonzero(np.diff(places))).tolist()
        yield from zip([first, *borders], [*borders, stop], strict=True)


def _check_bytes(store: Store, checksum: Checksum, found: Found) -> None:
    checksum.check()


@contextlib.contextmanager
def _workers(number: int) -> Iterator[Executor | None]:
    """Processes for the parts; None for work in this one."""
    if number == 1:
        yield None
        return
    context = multiprocessing.get_context("forkserver")
    pool = ProcessPoolExecutor(number, mp_context=context, initializer=_start_worker)
    try:
        yield pool
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process died (killed, or out of memory); run again with fewer --workers, or with 1 to see why"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _map(store: Store, parts: Iterator[_Part], pool: Executor | None) -> Iterator[tuple[int, _Part, Found]]:
    """(number, part, what was found) as parts are done. Only some are under way, however many there are."""
    if pool is None:
        yield from ((number, part, _do(store, part)) for number, part in enumerate(parts))
        return
    pending: dict[Future, tuple[int, _Part]] = {}
    for number, part in enumerate(parts):
        pending[pool.submit(_do_in_worker, store.prefix, part)] = number, part
        if len(pending) == _UNDER_WAY:
            yield from _done(pending)
    while pending:
        yield from _done(pending)


def _done(pending: dict[Future, tuple[int, _Part]]) -> Iterator[tuple[int, _Part, Found]]:
    for future in wait(pending, return_when=FIRST_COMPLETED).done:
        yield *pending.pop(future), future.result()


def _do(store: Store, part: _Part) -> Found:
    found = Found()
    try:
        part.work(store, found=found)
    except (DataError, OSError) as error:
        found.add(str(error))
    return found


def _do_in_worker(prefix: str, part: _Part) -> Found:
    return _do(_store(prefix), part)


@lru_cache(maxsize=1)
def _store(prefix: str) -> Store:
    """One per process: a dataset is opened once for all its parts."""
    return Store(prefix)


def _start_worker() -> None:
    end_with_parent()
    # Ctrl-C reaches every process of the terminal; the main process alone answers it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
