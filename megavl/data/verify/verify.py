"""Verification of a dataset: every file read whole, every entry checked, everything that is wrong listed.

The work is cut into parts of bounded size, which worker processes take one after another.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from functools import lru_cache, partial
from typing import Literal, NamedTuple

import numpy as np

from megavl.data.checksum import Checksum
from megavl.data.engines import local
from megavl.data.errors import DataError
from megavl.data.format import IMAGE
from megavl.data.store import Store
from megavl.data.verify.found import Found
from megavl.data.verify.images import check_images, check_rows
from megavl.data.verify.index import check_documents, check_sequences
from megavl.data.verify.keys import check_keys
from megavl.data.verify.tokenizer import check_tokenizer
from megavl.data.verify.tokens import check_tokens

Images = Literal["all", "sample", "none"]

# Entries of the index that are one part of the work; so are documents of so many bytes, or as many documents.
_ENTRIES = 1 << 20
_DOCUMENTS = 1 << 14
_BYTES = 1 << 25
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
    """Check a dataset whole. What each check found: "index", "checksums", "tokens", "images", "tokenizer", "keys".

    Keys that are repeated are no damage. Where the index is wrong, only the checksums are looked at besides; otherwise
    each check goes on whatever another finds.

    Args:
        tokenizer: file of the tokenizer that made it; None leaves that check out.
        images: decode all, those of one document in 16, or none.
        workers: processes; 1 works in this one.
        report: called with the bytes that were read since the last call.

    Raises:
        DataError: a worker process died.
    """
    findings: dict[str, Found] = {}

    def add(results: Iterable[tuple[_Part, Found]]) -> None:
        for part, found in results:
            findings.setdefault(part.check, Found()).more(found.count, found.messages)
            report(part.size_bytes)

    # Not in the workers: what follows depends on it, and a look at its columns costs little.
    add(map(partial(_do, store), _index(store)))
    parts = _checksums(store) if findings["index"].count else _contents(store, tokenizer, images)
    work = partial(_do, store) if workers == 1 else partial(_do_in_worker, store.prefix)
    with closing(local.run(work, parts, workers)) as results:
        add(results)
    return findings


def _index(store: Store) -> Iterator[_Part]:
    sequences, documents = len(store.lengths), len(store)
    # The bytes of the index are shared out among its entries.
    entry_bytes = os.path.getsize(store.paths.idx) / (sequences + documents)
    for size, check in ((sequences, check_sequences), (documents, check_documents)):
        for first in range(0, size, _ENTRIES):
            stop = min(first + _ENTRIES, size)
            yield _Part("index", partial(check, first=first, stop=stop), round((stop - first) * entry_bytes))


def _checksums(store: Store) -> Iterator[_Part]:
    for checksum in store.checksums():
        yield _Part("checksums", partial(_check_bytes, checksum=checksum), checksum.size_bytes)


def _contents(store: Store, tokenizer: str | None, images: Images) -> Iterator[_Part]:
    """Everything but the index itself."""
    yield from _checksums(store)
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
    # One part, and so the last: results come in order, and none waits for it here.
    yield _Part("keys", check_keys, os.path.getsize(store.paths.meta))


def _blocks(store: Store) -> Iterator[tuple[int, int]]:
    """Ranges of documents of about equal work."""
    for first in range(0, len(store), _DOCUMENTS):
        stop = min(first + _DOCUMENTS, len(store))
        places = store.pointers[store.documents[first:stop]] // _BYTES
        borders = (first + 1 + np.flatnonzero(np.diff(places))).tolist()
        yield from zip([first, *borders], [*borders, stop], strict=True)


def _check_bytes(store: Store, checksum: Checksum, found: Found) -> None:
    checksum.check()


def _do(store: Store, part: _Part) -> tuple[_Part, Found]:
    found = Found()
    try:
        part.work(store, found=found)
    except (DataError, OSError) as error:
        found.add(str(error))
    return part, found


def _do_in_worker(prefix: str, part: _Part) -> tuple[_Part, Found]:
    return _do(_store(prefix), part)


@lru_cache(maxsize=1)
def _store(prefix: str) -> Store:
    """One per process: a dataset is opened once for all its parts."""
    return Store(prefix)
