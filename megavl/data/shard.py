"""Shard: a stretch of the input that one process encodes into a dataset of its own. What is finished stays finished."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import chain
from typing import TextIO

from megavl.data.document import Document, Image, Text, Token
from megavl.data.encode import encode
from megavl.data.encoded import EncodedDocument
from megavl.data.errors import DataError
from megavl.data.readers.reader import Part, ReadOptions
from megavl.data.readers.registry import reader_of
from megavl.data.store import Store
from megavl.data.tokenizer import Tokenizer, load_tokenizer
from megavl.data.writer import StoreWriter

# Text and images that are encoded together: enough for a tokenizer that works on many texts at once.
_CHUNK_BYTES = 1 << 22
# Of each shard, in which gigatoken's ids are compared with those of the tokenizer's own package.
_CHECKED_CHARACTERS = 1 << 14


@dataclass(frozen=True)
class Counts:
    """What was read and written.

    input_bytes:  of the input files
    image_bytes:  of the images in them and of those that they name
    reused_bytes: the share of input_bytes that an earlier run had done
    rejected:     bad records, which were left out
    backends:     what served the tokenizers of the processes
    """

    documents: int = 0
    tokens: int = 0
    images: int = 0
    image_bytes: int = 0
    input_bytes: int = 0
    reused_bytes: int = 0
    rejected: int = 0
    backends: tuple[str, ...] = ()

    def __add__(self, other: "Counts") -> "Counts":
        sums = {name: value + getattr(other, name) for name, value in asdict(self).items()}
        return Counts(**sums | {"backends": tuple(dict.fromkeys(sums["backends"]))})


@dataclass(frozen=True)
class Shard:
    """Consecutive parts of the input, and the directory that what they become is kept in."""

    directory: str
    parts: tuple[Part, ...]

    @property
    def prefix(self) -> str:
        """Of the dataset; there is none where every record is bad or blank."""
        return os.path.join(self.directory, "part")

    @property
    def rejected(self) -> str:
        """File of the bad records: a JSON object per line, `where` and `reason`."""
        return os.path.join(self.directory, "rejected.jsonl")

    @property
    def report(self) -> str:
        """File of the counts."""
        return os.path.join(self.directory, "counts.json")

    def last_rejected(self) -> DataError:
        """The error of its last bad record."""
        with open(self.rejected, encoding="utf-8") as file:
            *_, last = file
        return DataError("{where}: {reason}".format(**json.loads(last)))


@dataclass(frozen=True)
class EncodeShard:
    """The work of one process on one shard; picklable.

    max_bad: bad records of the whole run that are left out instead of ending it
    plain_tokenizer: leave tokenising to the tokenizer's own package
    """

    tokenizer_path: str
    options: ReadOptions
    max_bad: int
    plain_tokenizer: bool = False

    def __call__(self, shard: Shard) -> Counts:
        """Encode a shard, unless that is done: its directory appears when it is whole.

        Raises:
            DataError: a file cannot be read any further, or there are more bad records than `max_bad`.
        """
        if (counts := finished(shard)) is not None:
            return replace(counts, reused_bytes=counts.input_bytes)
        # What is there and not finished was damaged from outside.
        shutil.rmtree(shard.directory, ignore_errors=True)
        temporary = tempfile.mkdtemp(dir=os.path.dirname(shard.directory), suffix=".tmp")
        try:
            counts = self._encode(replace(shard, directory=temporary))
            os.rename(temporary, shard.directory)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return counts

    def _encode(self, shard: Shard) -> Counts:
        with open(shard.rejected, "w", encoding="utf-8") as log:
            rejected = _Rejected(log, self.max_bad)
            read = _chunks(read for part in shard.parts for read in reader_of(part.path).read(part, self.options))
            start = next(read, [])
            # Decided by the shard alone, so that its bytes do not depend on what else this process does.
            tokenizer = _tokenizer(self.tokenizer_path, self.plain_tokenizer).checked(_first_texts(start))
            chunks = rejected.without(_encoded(chain([start], read), tokenizer))
            input_bytes = sum(part.size_bytes for part in shard.parts)
            counts = Counts(input_bytes=input_bytes, backends=(tokenizer.backend,))
            # A dataset holds at least one document.
            if first := next(chunks, None):
                with StoreWriter(shard.prefix, tokenizer) as writer:
                    for documents in chain([first], chunks):
                        writer.add(*documents)
                counts = replace(
                    counts,
                    documents=writer.documents,
                    tokens=writer.tokens,
                    images=writer.images,
                    image_bytes=writer.image_bytes,
                )
        counts = replace(counts, rejected=rejected.number)
        with open(shard.report, "w", encoding="utf-8") as file:
            json.dump(asdict(counts), file)
        return counts


def finished(shard: Shard) -> Counts | None:
    """Counts of a shard that is done and whole, or None."""
    try:
        with open(shard.report, encoding="utf-8") as file:
            values = json.load(file)
        counts = Counts(**values | {"backends": tuple(values["backends"])})
        if counts.documents:
            Store(shard.prefix)
    except (OSError, ValueError, LookupError, TypeError, DataError):
        return None
    return counts


class _Rejected:
    """Bad records: written down while there are not too many."""

    def __init__(self, log: TextIO, max_bad: int) -> None:
        self._log, self._max_bad = log, max_bad
        self.number = 0

    def without(self, chunks: Iterable[list[EncodedDocument | DataError]]) -> Iterator[list[EncodedDocument]]:
        """The documents that are not bad, in lists that are not empty."""
        for chunk in chunks:
            for bad in chunk:
                if isinstance(bad, DataError):
                    self._reject(bad)
            if documents := [document for document in chunk if isinstance(document, EncodedDocument)]:
                yield documents

    def _reject(self, error: DataError) -> None:
        self.number += 1
        if self.number > self._max_bad:
            raise too_many_bad(error, self._max_bad)
        where, _, reason = str(error).partition(": ")
        print(json.dumps({"where": where, "reason": reason}, ensure_ascii=False), file=self._log)


def too_many_bad(last: DataError, max_bad: int) -> DataError:
    """The error that ends a run after one bad record too many."""
    return DataError(f"{last} (more than --max-bad {max_bad} records are bad)") if max_bad else last


def _encoded(
    chunks: Iterable[list[Document | DataError]], tokenizer: Tokenizer
) -> Iterator[list[EncodedDocument | DataError]]:
    """The documents encoded, and in their places the errors of bad records."""
    for chunk in chunks:
        encoded = iter(encode([read for read in chunk if isinstance(read, Document)], tokenizer))
        yield [read if isinstance(read, DataError) else next(encoded) for read in chunk]


def _first_texts(chunk: Iterable[Document | DataError]) -> list[str]:
    """What the tokenizer is checked on before a shard."""
    segments = (segment for read in chunk if isinstance(read, Document) for segment in read.segments)
    texts, left = [], _CHECKED_CHARACTERS
    for text in (segment.text for segment in segments if isinstance(segment, Text)):
        texts.append(text[:left])
        left -= len(text)
        if left <= 0:
            break
    return texts


def _chunks(stream: Iterable[Document | DataError]) -> Iterator[list[Document | DataError]]:
    chunk: list[Document | DataError] = []
    size = 0
    for read in stream:
        chunk.append(read)
        size += _size(read)
        if size >= _CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _size(read: Document | DataError) -> int:
    """Bytes of images and characters of text."""
    if isinstance(read, DataError):
        return 0
    return sum(len(one.data if isinstance(one, Image) else one.text) for one in read.segments if type(one) is not Token)


@cache
def _tokenizer(path: str, plain: bool) -> Tokenizer:
    """One tokenizer per process: it is too large to travel with every shard."""
    tokenizer = load_tokenizer(path)
    if not plain:
        tokenizer.accelerate()
    return tokenizer
