"""Build: input files to a store, over worker processes."""

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cache, partial

from megavl.data.encode import encode
from megavl.data.encoded import EncodedDocument, EncodedImage, EncodedText
from megavl.data.errors import DataError
from megavl.data.readers.reader import Part, ReadOptions
from megavl.data.readers.registry import input_files, reader_of
from megavl.data.tokenizer import Tokenizer, load_tokenizer
from megavl.data.worker import end_with_parent
from megavl.data.writer import StoreWriter

# What a worker gets at a time.
_PART_BYTES = 1 << 20


@dataclass(frozen=True)
class Progress:
    """What has been written so far. `input_bytes` are read from the input files, `image_bytes` from those they name."""

    documents: int = 0
    tokens: int = 0
    images: int = 0
    input_bytes: int = 0
    image_bytes: int = 0


def build(
    paths: list[str],
    prefix: str,
    tokenizer_path: str,
    workers: int,
    overwrite: bool,
    report: Callable[[Progress], None],
) -> Progress:
    """Write the documents of the files, in order, as one store; the same bytes for any number of workers.

    Args:
        workers: processes that parse, tokenise and check images; 1 does it in this process.
        report: called after every chunk.

    Raises:
        DataError: a record is malformed, an image is missing or broken, or the output exists; nothing is left behind.
    """
    tokenizer = load_tokenizer(tokenizer_path)
    progress = Progress()
    with StoreWriter(prefix, tokenizer, overwrite) as writer:
        work = partial(_encode, tokenizer_path)
        for size, documents in _map(work, _parts(paths), workers):
            writer.add(*documents)
            images = [item for document in documents for item in document.sequences if isinstance(item, EncodedImage)]
            texts = [item for document in documents for item in document.sequences if isinstance(item, EncodedText)]
            progress = Progress(
                documents=progress.documents + len(documents),
                tokens=progress.tokens + sum(len(text.tokens) for text in texts),
                images=progress.images + len(images),
                input_bytes=progress.input_bytes + size,
                image_bytes=progress.image_bytes + sum(len(image.data) for image in images),
            )
            report(progress)
    return progress


def _parts(paths: Iterable[str]) -> Iterator[Part]:
    return (part for path in input_files(list(paths)) for part in reader_of(path).split(path, _PART_BYTES))


def _encode(tokenizer_path: str, part: Part) -> tuple[int, list[EncodedDocument]]:
    """(bytes of the part, its documents)."""
    documents = []
    for document in reader_of(part.path).read(part, ReadOptions()):
        if isinstance(document, DataError):
            raise document
        documents.append(document)
    encoded = encode(documents, _tokenizer(tokenizer_path))
    for document in encoded:
        if isinstance(document, DataError):
            raise document
    return part.size_bytes, encoded


@cache
def _tokenizer(path: str) -> Tokenizer:
    """One tokenizer per process: it is too large to travel with every chunk."""
    tokenizer = load_tokenizer(path)
    tokenizer.accelerate()
    return tokenizer


def _map(
    work: Callable[[Part], tuple[int, list[EncodedDocument]]], chunks: Iterator[Part], workers: int
) -> Iterator[tuple[int, list[EncodedDocument]]]:
    """Results in the order of the chunks. Only a few chunks per worker are under way, however large the input is."""
    if workers == 1:
        yield from map(work, chunks)
        return
    context = multiprocessing.get_context("forkserver")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    pending: deque[Future] = deque()
    try:
        for chunk in chunks:
            pending.append(pool.submit(work, chunk))
            if len(pending) == 4 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process died (killed, or out of memory); run again with fewer --workers, or with 1 to see why"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    end_with_parent()
    # Ctrl-C reaches every process of the terminal; the main process alone answers it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
