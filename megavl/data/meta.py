"""The .meta file (Arrow IPC): what Megatron's format has no place for. The tokenizer that made the tokens, the
templates of conversations, checksums, and a row per document: its key, its source and the sizes of its images."""

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow as pa

from megavl.data.encoded import EncodedDocument, EncodedImage
from megavl.data.errors import DataError

_VERSION = "3"
_KEY, _KEY_SHA256 = b"megavl", b"megavl_sha256"
# Documents of one Arrow record batch.
_ROWS = 65536
_IMAGES = pa.list_(pa.struct([("width", pa.int32()), ("height", pa.int32()), ("bytes", pa.int32())]))
_SCHEMA = pa.schema([("key", pa.string()), ("source", pa.string()), ("images", _IMAGES)])


@dataclass(frozen=True)
class Meta:
    """Facts about a dataset that its .bin and .idx do not tell.

    tokenizer:  sha256 of the tokenizer's file
    vocab_size: largest token id + 1
    templates:  names of those that wrote its conversations; none where it holds no conversation
    multimodal: whether the index has modes
    images:     in the whole dataset
    bin_parts:  (bytes, sha256) of each consecutive part of the .bin file
    idx_sha256: of the .idx file
    row_parts:  (documents, sha256) of each record batch
    """

    tokenizer: str
    vocab_size: int
    templates: tuple[str, ...]
    multimodal: bool
    images: int
    bin_parts: tuple[tuple[int, str], ...]
    idx_sha256: str
    row_parts: tuple[tuple[int, str], ...]

    def other_tokenizer(self, name: str, identity: str, vocab_size: int) -> str | None:
        """What to say of a dataset that was made with another tokenizer than the one called `name`; None if it was made
        with that one."""
        if (self.tokenizer, self.vocab_size) == (identity, vocab_size):
            return None
        return (
            f"was made with another tokenizer (sha256 {self.tokenizer[:16]}..., vocabulary {self.vocab_size}) than "
            f"{name} (sha256 {identity[:16]}..., vocabulary {vocab_size})"
        )


class RowWriter:
    """Collects the rows of documents; a context manager.

    They are in an unnamed file beside the output: the facts come first in the .meta file, and are known last.

    parts: (documents, sha256) of each record batch so far
    """

    def __init__(self, directory: Path) -> None:
        """Nothing is written before the `with` block is entered."""
        self._directory, self._open = directory, contextlib.ExitStack()
        self._rows: dict[str, list] = {name: [] for name in _SCHEMA.names}
        self.parts: list[tuple[int, str]] = []

    def append(self, document: EncodedDocument) -> None:
        """The row of a document."""
        self._rows["key"].append(document.key)
        self._rows["source"].append(document.source)
        images = [one for one in document.sequences if isinstance(one, EncodedImage)]
        self._rows["images"].append([(image.width, image.height, len(image.data)) for image in images])
        if len(self._rows["key"]) == _ROWS:
            self._flush()

    def batches(self) -> Iterator[pa.RecordBatch]:
        """All rows. `parts` is complete now, and nothing can be appended any more."""
        if self._rows["key"]:
            self._flush()
        self._writer.close()
        self._file.seek(0)
        return iter(pa.ipc.open_stream(self._file))

    def __enter__(self) -> "RowWriter":
        self._file = self._open.enter_context(tempfile.TemporaryFile(dir=self._directory))
        self._writer = self._open.enter_context(pa.ipc.new_stream(self._file, _SCHEMA))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._open.close()

    def _flush(self) -> None:
        batch = pa.record_batch(self._rows, schema=_SCHEMA)
        self._writer.write_batch(batch)
        self.parts.append((len(batch), _digest(batch)))
        for column in self._rows.values():
            column.clear()


def write_meta(path: str, meta: Meta, batches: Iterable[pa.RecordBatch]) -> None:
    """Write the .meta file of a dataset; `batches` are those that `meta.row_parts` counts."""
    facts = json.dumps({"version": _VERSION} | asdict(meta)).encode()
    schema = _SCHEMA.with_metadata({_KEY: facts, _KEY_SHA256: hashlib.sha256(facts).hexdigest()})
    with pa.OSFile(path, "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for batch in batches:
            writer.write_batch(batch.replace_schema_metadata(schema.metadata))


class MetaReader:
    """Reads a .meta file; the rows stay on disk until they are asked for.

    facts: what it says of the dataset as a whole
    """

    def __init__(self, path: str) -> None:
        """Read the facts.

        Raises:
            DataError: the file is damaged, or of a version that this reader does not know.
        """
        self.path = path
        try:
            # Read and not mapped: the pages of a map would stay in memory.
            self._file = pa.ipc.open_file(pa.OSFile(path))
            if not self._file.schema.equals(_SCHEMA):
                raise ValueError(f"its columns are {self._file.schema.names}")
            metadata = self._file.schema.metadata
            values = json.loads(metadata[_KEY])
            version = values.pop("version")
            if version != _VERSION:
                raise DataError(
                    f"{path} has version {version}, of another release; this one knows version {_VERSION}, which says "
                    "more of the dataset than its files do; make the dataset again"
                )
            if hashlib.sha256(metadata[_KEY]).hexdigest().encode() != metadata[_KEY_SHA256]:
                raise DataError(f"{path} is damaged: its facts do not have their checksum; copy or make it again")
            parts = {name: tuple(map(tuple, values[name])) for name in ("bin_parts", "row_parts")}
            self.facts = Meta(**values | parts | {"templates": tuple(values["templates"])})
        except (pa.ArrowException, OSError, ValueError, LookupError, TypeError) as error:
            raise DataError(f"{path} is damaged or not the .meta file of a dataset ({error}); make it again") from error
        # First document of each batch, and behind the last one their number.
        self._first = np.cumsum([0] + [size for size, _ in self.facts.row_parts])
        self._last: tuple[int, pa.RecordBatch | None] = (-1, None)

    def __len__(self) -> int:
        """Documents."""
        return int(self._first[-1])

    def rows(self, first: int, stop: int) -> pa.Table:
        """Columns `key`, `source` and `images` of a range of documents.

        Raises:
            DataError: the rows are not those that were written.
        """
        number = int(np.searchsorted(self._first, first, side="right")) - 1
        behind = int(np.searchsorted(self._first, stop))
        table = pa.Table.from_batches(map(self._batch, range(number, behind)), _SCHEMA)
        return table.slice(first - int(self._first[number]), stop - first)

    def batches(self) -> Iterator[pa.RecordBatch]:
        """All rows, each batch checked.

        Raises:
            DataError: they are not those that were written.
        """
        return map(self._batch, range(len(self.facts.row_parts)))

    def _batch(self, number: int) -> pa.RecordBatch:
        if self._last[0] == number:
            return self._last[1]
        try:
            batch = self._file.get_batch(number)
            # Arrow trusts offsets that it reads from a file; without this a damaged one ends the process.
            batch.validate(full=True)
        except (pa.ArrowException, OSError, ValueError, IndexError) as error:
            raise DataError(f"{self.path}: its rows are damaged ({error}); copy or make it again") from error
        if (len(batch), _digest(batch)) != self.facts.row_parts[number]:
            raise DataError(f"{self.path}: its rows do not have their checksum; copy or make it again")
        self._last = (number, batch)
        return batch


def _digest(batch: pa.RecordBatch) -> str:
    """sha256 of the columns' buffers, which are the same in memory and in any file."""
    digest = hashlib.sha256()
    for column in batch.columns:
        for buffer in filter(None, column.buffers()):
            digest.update(buffer)
    return digest.hexdigest()
