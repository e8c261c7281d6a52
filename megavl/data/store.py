"""The indexed dataset: `<prefix>.bin` and `<prefix>.idx`, byte for byte Megatron's, and `<prefix>.meta`.

Source: `IndexedDatasetBuilder` and `IndexedDataset` of megatron-core 0.16.1, which open what is written here. The .meta
file (Arrow IPC) holds what Megatron's format has no place for: which tokenizer made the tokens, checksums, keys of the
documents, sizes of their images. docs/data.md has the layout.
"""

import contextlib
import hashlib
import json
import os
import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow as pa

from megavl.data.errors import DataError
from megavl.data.tokenizer import Tokenizer, file_identity

# Modes of a sequence. 0 and 1 are Megatron's; text that is read but not learned (a user's turn) is 2.
TEXT, IMAGE, PROMPT = 0, 1, 2

_MAGIC = b"MMIDIDX\x00\x00"
_LEGACY_MAGIC = b"TNTIDX\x00\x00"
_VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
# uint8, ..., uint16 by the codes of the format; 6 and 7 are floating point, which no token is.
_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_CODES = {np.dtype(name): code for code, name in _DTYPES.items()}
_META_VERSION = "1"
_META_KEY = b"megavl"
# Documents of one Arrow record batch.
_ROWS = 65536
_IMAGES = pa.list_(pa.struct([("width", pa.int32()), ("height", pa.int32()), ("bytes", pa.int32())]))
_COLUMNS = [pa.field("key", pa.string()), pa.field("source", pa.string()), pa.field("images", _IMAGES)]


def token_dtype(vocab_size: int, multimodal: bool) -> np.dtype:
    """Elements of the .bin file, by megatron-core's rule for text; images need int32."""
    return np.dtype("<u2" if vocab_size < 65500 and not multimodal else "<i4")


def refuse_existing(prefix: str) -> None:
    """Raises DataError where files of a store have this prefix already."""
    existing = [path for path in _paths(prefix).values() if os.path.exists(path)]
    if existing:
        raise DataError(f"{', '.join(existing)} exist already; choose another output prefix or pass --overwrite")


def _paths(prefix: str) -> dict[str, str]:
    if not os.path.basename(prefix):
        raise DataError(
            f"the prefix {prefix!r} ends without a name, so that its files would be hidden ones called .bin, .idx and "
            f".meta; add a name, for example {prefix}corpus"
        )
    return {suffix: f"{prefix}.{suffix}" for suffix in ("bin", "idx", "meta")}


@dataclass(frozen=True)
class EncodedImage:
    """An image as it goes into the store: the bytes of its file, and its size in pixels."""

    data: bytes
    width: int
    height: int


@dataclass(frozen=True)
class EncodedDocument:
    """A document as it goes into the store: token ids and images in reading order."""

    key: str
    source: str
    sequences: tuple[Sequence[int] | EncodedImage, ...]


@dataclass(frozen=True)
class Meta:
    """Facts about a store that its .bin and .idx do not tell. `tokenizer`: sha256 of the tokenizer's file."""

    tokenizer: str
    vocab_size: int
    multimodal: bool
    bin_sha256: str
    idx_sha256: str


class StoreWriter:
    """Writes a store; as a context manager it appears whole under its name at the end, or not at all.

    Lengths and documents are kept as machine integers (21 bytes per sequence at most), keys go to disk at once.
    """

    def __init__(self, prefix: str, tokenizer: Tokenizer, multimodal: bool, overwrite: bool = False) -> None:
        """Nothing is written before the `with` block is entered.

        Raises:
            DataError: files of that prefix exist and `overwrite` is false.
        """
        self.multimodal = multimodal
        self._final = _paths(prefix)
        self._temporary = {suffix: f"{path}.tmp" for suffix, path in self._final.items()}
        self._rows_path = f"{prefix}.rows.tmp"
        if not overwrite:
            refuse_existing(prefix)
        self._tokenizer, self._vocab_size = tokenizer.identity, tokenizer.vocab_size
        self._dtype = token_dtype(tokenizer.vocab_size, multimodal)
        self._lengths, self._documents, self._modes = array("i"), array("q", [0]), array("b")
        self._rows: dict[str, list] = {field.name: [] for field in _COLUMNS}
        self._schema = pa.schema(_COLUMNS)
        self._sha256 = hashlib.sha256()
        self._open = contextlib.ExitStack()

    def add(self, document: EncodedDocument) -> None:
        """Append one document.

        Raises:
            DataError: it is empty, holds a token outside the vocabulary, or an image where the store is text.
        """
        if not document.sequences:
            raise DataError(f"{document.source}: document {document.key} is empty; leave it out")
        for sequence in document.sequences:
            elements = self._image(document, sequence) if isinstance(sequence, EncodedImage) else None
            mode = TEXT if elements is None else IMAGE
            data = (self._tokens(document, sequence) if elements is None else elements).tobytes()
            self._bin.write(data)
            self._sha256.update(data)
            self._lengths.append(len(data) // self._dtype.itemsize)
            self._modes.append(mode)
        self._documents.append(len(self._lengths))
        images = [image for image in document.sequences if isinstance(image, EncodedImage)]
        self._rows["key"].append(document.key)
        self._rows["source"].append(document.source)
        self._rows["images"].append(
            [{"width": image.width, "height": image.height, "bytes": len(image.data)} for image in images]
        )
        if len(self._rows["key"]) == _ROWS:
            self._flush_rows()

    def finish(self) -> None:
        """Write the index and the .meta file, and give the three files their names.

        Raises:
            DataError: no document was added.
        """
        if len(self._documents) == 1:
            raise DataError(f"{self._final['bin']}: there is no document to write, and an empty store cannot be read")
        self._flush_rows()
        self._open.close()
        self._write_index()
        self._write_meta()
        os.remove(self._rows_path)
        # An old .meta goes first and the new one comes last: whatever stops this half-way leaves no store that opens.
        with contextlib.suppress(FileNotFoundError):
            os.remove(self._final["meta"])
        for suffix in ("bin", "idx", "meta"):
            os.replace(self._temporary[suffix], self._final[suffix])

    def abort(self) -> None:
        """Remove what was written so far."""
        self._open.close()
        for path in (*self._temporary.values(), self._rows_path):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                os.remove(path)

    def __enter__(self) -> "StoreWriter":
        try:
            Path(self._temporary["bin"]).parent.mkdir(parents=True, exist_ok=True)
            self._bin = self._open.enter_context(open(self._temporary["bin"], "wb"))
            rows = self._open.enter_context(pa.OSFile(self._rows_path, "wb"))
            self._rows_writer = self._open.enter_context(pa.ipc.new_stream(rows, self._schema))
        except OSError as error:
            self.abort()
            raise DataError(
                f"{error.filename} cannot be written ({error.strerror}); check the output prefix"
            ) from error
        except BaseException:
            self.abort()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self.abort()

    def _tokens(self, document: EncodedDocument, tokens: Sequence[int]) -> np.ndarray:
        values = np.asarray(tokens, dtype=np.int64)
        if not len(values):
            raise DataError(f"{document.source}: document {document.key} holds an empty text sequence; leave it out")
        if values.min() < 0 or values.max() >= self._vocab_size:
            raise DataError(
                f"{document.source}: document {document.key} holds the token ids {values.min()} to {values.max()}, but "
                f"the vocabulary is 0 to {self._vocab_size - 1}; they would wrap around or train a row that is not "
                "there; use the tokenizer that made the tokens"
            )
        return values.astype(self._dtype)

    def _image(self, document: EncodedDocument, image: EncodedImage) -> np.ndarray:
        """Element 0 counts the pad bytes that make the file's bytes whole int32 elements."""
        if not self.multimodal:
            raise DataError(
                f"{document.source}: document {document.key} holds an image, but the store was opened for text only; "
                "write a multimodal store"
            )
        pad = -len(image.data) % 4
        return np.frombuffer(struct.pack("<i", pad) + image.data + bytes(pad), dtype=self._dtype)

    def _write_index(self) -> None:
        lengths = np.frombuffer(self._lengths, dtype=np.int32)
        pointers = np.zeros(len(lengths), dtype="<i8")
        np.cumsum(lengths[:-1], dtype=np.int64, out=pointers[1:])
        pointers *= self._dtype.itemsize
        with open(self._temporary["idx"], "wb") as file:
            file.write(_HEADER.pack(_MAGIC, _VERSION, _CODES[self._dtype], len(lengths), len(self._documents)))
            file.write(lengths.astype("<i4"))
            file.write(pointers)
            file.write(np.frombuffer(self._documents, dtype=np.int64).astype("<i8"))
            if self.multimodal:
                file.write(self._modes)

    def _flush_rows(self) -> None:
        columns = [pa.array(self._rows[field.name], field.type) for field in _COLUMNS]
        self._rows_writer.write_batch(pa.record_batch(columns, schema=self._schema))
        for column in self._rows.values():
            column.clear()

    def _write_meta(self) -> None:
        """Copy the rows behind a schema that carries the checksums, which are known only now."""
        facts = {
            "version": _META_VERSION,
            "tokenizer": self._tokenizer,
            "vocab_size": self._vocab_size,
            "multimodal": self.multimodal,
            "bin_sha256": self._sha256.hexdigest(),
            "idx_sha256": file_identity(Path(self._temporary["idx"])),
        }
        schema = self._schema.with_metadata({_META_KEY: json.dumps(facts)})
        with (
            pa.OSFile(self._rows_path, "rb") as source,
            pa.OSFile(self._temporary["meta"], "wb") as sink,
            pa.ipc.new_file(sink, schema) as writer,
        ):
            for batch in pa.ipc.open_stream(source):
                writer.write_batch(batch.replace_schema_metadata(schema.metadata))


class Store:
    """Reads a store through memory maps; picklable, so that a worker process opens its own.

    lengths:   int32 [N] elements of each sequence
    pointers:  int64 [N] place of each sequence in the .bin file, in bytes
    modes:     int8 [N], TEXT or IMAGE, of each sequence
    documents: int64 [D + 1]; document k is the sequences documents[k] to documents[k + 1]
    """

    def __init__(self, prefix: str, multimodal: bool) -> None:
        """Map the files and compare them with one another.

        Args:
            multimodal: what the caller takes the store for; the files must agree.

        Raises:
            DataError: a file is missing, cut off, of another format, of another kind, or contradicts the others.
        """
        self.prefix, self.multimodal = prefix, multimodal
        self._bin_path, self._idx_path, self._meta_path = _paths(prefix).values()
        missing = [path for path in (self._bin_path, self._idx_path, self._meta_path) if not os.path.isfile(path)]
        if missing:
            raise DataError(
                f"dataset {prefix}: {', '.join(missing)} not found; make the dataset with "
                f"`python tools/preprocess_data.py --input ... --output-prefix {prefix} --tokenizer ...`"
            )
        self._read_index()
        self._read_meta()
        size, expected = os.path.getsize(self._bin_path), self._expected_bin_size()
        if size != expected:
            raise DataError(
                f"{self._bin_path} has {size} bytes, but {self._idx_path} describes {expected}; it was cut off or "
                "belongs to another index; copy or make both files again"
            )
        self._bin = np.memmap(self._bin_path, dtype=self.dtype, mode="r")

    def __reduce__(self) -> tuple:
        return Store, (self.prefix, self.multimodal)

    def __len__(self) -> int:
        """Documents."""
        return len(self.documents) - 1

    def text(self, sequence: int, start: int, stop: int) -> np.ndarray:
        """Tokens `start` to `stop` of a text sequence: int64 [stop - start]."""
        first = int(self.pointers[sequence]) // self.dtype.itemsize
        return self._bin[first + start : first + stop].astype(np.int64)

    def image(self, sequence: int) -> bytes:
        """Bytes of the image file in an image sequence.

        Raises:
            DataError: the number of pad bytes is not 0 to 3: what is stored there is no image.
        """
        first = int(self.pointers[sequence]) // self.dtype.itemsize
        payload = self._bin[first : first + int(self.lengths[sequence])].tobytes()
        pad = struct.unpack_from("<i", payload)[0]
        if not 0 <= pad <= 3:
            raise DataError(
                f"{self._bin_path}: sequence {sequence} starts with {pad}, not a number of pad bytes (0 to 3)"
            )
        return payload[4 : len(payload) - pad]

    def key(self, document: int) -> str:
        """Key of a document."""
        return self._rows["key"][document].as_py()

    def source(self, document: int) -> str:
        """File that a document was read from."""
        return self._rows["source"][document].as_py()

    def rows(self, first: int, stop: int) -> pa.Table:
        """Columns `key`, `source` and `images` of a range of documents; nothing is copied."""
        return self._rows.slice(first, stop - first)

    def where(self, document: int) -> str:
        """How an error names a document."""
        return f"{self.prefix}: document {self.key(document)} (number {document}, from {self.source(document)})"

    def verify(self) -> None:
        """Read both files whole and compare their checksums with those of the .meta file.

        Raises:
            DataError: the bytes of a file are not those that were written.
        """
        for path, expected in ((self._bin_path, self.meta.bin_sha256), (self._idx_path, self.meta.idx_sha256)):
            actual = file_identity(Path(path))
            if actual != expected:
                raise DataError(
                    f"{path} has the sha256 {actual}, but {self._meta_path} says {expected}; the file was changed or "
                    "damaged after it was written; copy or make it again"
                )

    def _read_index(self) -> None:
        path, size = self._idx_path, os.path.getsize(self._idx_path)
        with open(path, "rb") as file:
            header = file.read(_HEADER.size)
        if header.startswith(_LEGACY_MAGIC):
            raise DataError(
                f"{path} has the legacy format of Megatron's lazy and cached datasets (magic TNTIDX); "
                "make the dataset again with tools/preprocess_data.py"
            )
        if len(header) < _HEADER.size or not header.startswith(_MAGIC):
            raise DataError(f"{path} is not the index of an indexed dataset: it starts with {header[:9]!r}")
        _, version, code, sequences, entries = _HEADER.unpack(header)
        if version != _VERSION:
            raise DataError(f"{path} has version {version} of the index format; this reader knows version {_VERSION}")
        if code not in _DTYPES:
            raise DataError(f"{path} holds elements of dtype code {code}; tokens have one of {sorted(_DTYPES)}")
        if sequences == 0 or entries < 2:
            raise DataError(f"{path} describes an empty dataset; remove it from the sources or make it again")
        text_size = _HEADER.size + 12 * sequences + 8 * entries
        match size - text_size:
            case 0:
                found = False
            case rest if rest == sequences:
                found = True
            case _:
                raise DataError(
                    f"{path} has {size} bytes, but {sequences} sequences and {entries} document indices take "
                    f"{text_size} (text) or {text_size + sequences} (multimodal); it was cut off; copy or make it again"
                )
        if found != self.multimodal:
            kinds = {True: "multimodal", False: "text"}
            raise DataError(
                f"{path} is a {kinds[found]} dataset, but it is read as {kinds[self.multimodal]}; list it under "
                f"data.{kinds[found]} (read as the other kind, image bytes would become tokens)"
            )
        self.dtype = np.dtype(_DTYPES[code])
        offsets = np.cumsum([_HEADER.size, 4 * sequences, 8 * sequences, 8 * entries]).tolist()
        self.lengths = np.memmap(path, "<i4", "r", offsets[0], (sequences,))
        self.pointers = np.memmap(path, "<i8", "r", offsets[1], (sequences,))
        self.documents = np.memmap(path, "<i8", "r", offsets[2], (entries,))
        # A text index has no modes: a view of one zero, read as often as there are sequences.
        zeros = np.broadcast_to(np.int8(TEXT), (sequences,))
        self.modes = np.memmap(path, "i1", "r", offsets[3], (sequences,)) if found else zeros
        if self.documents[0] != 0 or self.documents[-1] != sequences:
            raise DataError(
                f"{path}: its documents cover the sequences {self.documents[0]} to {self.documents[-1]}, not 0 to "
                f"{sequences}; the writer did not end its last document; make the dataset again"
            )

    def _read_meta(self) -> None:
        path = self._meta_path
        try:
            self._rows = pa.ipc.open_file(pa.memory_map(path)).read_all()
            facts = json.loads(self._rows.schema.metadata[_META_KEY])
        except (pa.ArrowInvalid, OSError, ValueError, LookupError, TypeError) as error:
            raise DataError(f"{path} is damaged or not the .meta file of a dataset ({error}); make it again") from error
        version = facts.pop("version")
        if version != _META_VERSION:
            raise DataError(f"{path} has version {version}; this reader knows version {_META_VERSION}")
        self.meta = Meta(**facts)
        if (self.meta.multimodal, len(self._rows)) != (self.multimodal, len(self)):
            raise DataError(
                f"{path} (multimodal: {self.meta.multimodal}, {len(self._rows)} documents) and {self._idx_path} "
                f"(multimodal: {self.multimodal}, {len(self)} documents) do not belong together; make both again"
            )
        expected = token_dtype(self.meta.vocab_size, self.multimodal)
        if self.dtype != expected:
            raise DataError(
                f"{self._idx_path} holds {self.dtype} elements, but the vocabulary of {self.meta.vocab_size} in "
                f"{path} is stored as {expected}; the files do not belong together; make both again"
            )

    def _expected_bin_size(self) -> int:
        return int(self.pointers[-1]) + int(self.lengths[-1]) * self.dtype.itemsize
