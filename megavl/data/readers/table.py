"""Tables: Parquet, and Arrow files and streams, as HF datasets writes them. A row is a record, numbered in its file.

Only columns that a layout reads are read, and few rows are in memory, however large their row group or batch is.
"""

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any

import pyarrow
from pyarrow import ipc, parquet

from megavl.data.document import Document
from megavl.data.errors import DataError
from megavl.data.readers.files import read_image
from megavl.data.readers.reader import Part, ReadOptions, file_size, too_large
from megavl.data.readers.record import KEYS, Place, Record, to_document
from megavl.data.template import TEMPLATES

SUFFIXES = (".parquet", ".arrow")

# Of the rows that are in memory, as far as the mean of their group tells.
_ROWS_BYTES = 16 << 20


def split(path: str, part_bytes: int) -> Iterator[Part]:
    """Runs of row groups of a Parquet file, of record batches of an Arrow file.

    Raises:
        DataError: the file cannot be read, or has no column that a layout reads.
    """
    start, first, rows, size_bytes = 0, 1, 0, 0
    for stop, (more_rows, more_bytes) in enumerate(_groups(path), start=1):
        rows, size_bytes = rows + more_rows, size_bytes + more_bytes
        if size_bytes >= part_bytes:
            yield Part(path, start, stop, first, size_bytes)
            start, first, rows, size_bytes = stop, first + rows, 0, 0
    if rows:
        yield Part(path, start, stop, first, size_bytes)


def read(part: Part, options: ReadOptions) -> Iterator[Document | DataError]:
    """Documents of the part's rows; for a malformed row the error that names it.

    Raises:
        DataError: the file cannot be read, or is damaged from some row on.
    """
    image = partial(read_image, os.path.dirname(part.path), max_bytes=options.max_record_bytes)
    template = TEMPLATES[options.template]
    rows = (row for piece in _pieces(part) for row in _rows(piece, options))
    for number, row in enumerate(rows, start=part.first):
        place = Place(part.path, number)
        try:
            if isinstance(row, DataError):
                raise row
            yield to_document(Record(row, image, template), place)
        except DataError as error:
            yield place.refuse(error)


def _rows(rows: pyarrow.RecordBatch, options: ReadOptions) -> Iterator[dict[str, Any] | DataError]:
    """Values of the rows; where that fails, row by row, to find those to blame."""
    try:
        yield from _values(rows, options)
    except (pyarrow.ArrowException, ValueError):
        yield from (_row(rows.slice(index, 1), options) for index in range(rows.num_rows))


def _values(rows: pyarrow.RecordBatch, options: ReadOptions) -> list[dict[str, Any]]:
    """Raises DataError for more bytes than one record may have, and Arrow's errors for values that are not what their
    type says."""
    if rows.nbytes > options.max_record_bytes:
        raise too_large(options)
    # Arrow trusts a file: lengths, offsets and UTF-8 are as wrong as their writer left them.
    rows.validate(full=True)
    return rows.to_pylist()


def _row(row: pyarrow.RecordBatch, options: ReadOptions) -> dict[str, Any] | DataError:
    try:
        return _values(row, options)[0]
    except DataError as error:
        return error
    except (pyarrow.ArrowException, ValueError) as error:
        return DataError(f"holds a value that is not of its column's type ({error}); write the row again")


def _groups(path: str) -> Iterator[tuple[int, int]]:
    """(rows, bytes) of each row group or record batch."""
    with _damage(path):
        memory = _mapped(path)
        if _is_parquet(path):
            file, _ = _parquet(path, memory)
            groups = [file.metadata.row_group(index) for index in range(file.metadata.num_row_groups)]
            # Its share of the file, by what it unpacks to: a look at its damaged columns would abort the process.
            total = max(1, sum(group.total_byte_size for group in groups))
            yield from ((group.num_rows, len(memory) * group.total_byte_size // total) for group in groups)
        else:
            yield from ((batch.num_rows, batch.nbytes) for batch in _arrow_batches(path, memory))


def _pieces(part: Part) -> Iterator[pyarrow.RecordBatch]:
    """The part's rows, about `_ROWS_BYTES` at a time."""
    with _damage(part.path):
        memory = _mapped(part.path)
        if _is_parquet(part.path):
            batches = _parquet_batches(part, memory)
        else:
            batches = islice(_arrow_batches(part.path, memory), part.start, part.stop)
        for batch in batches:
            step = max(1, batch.num_rows * _ROWS_BYTES // max(1, batch.nbytes))
            for start in range(0, batch.num_rows, step):
                yield batch.slice(start, step)
                # What was read stays in the system's cache, but counts no longer as this process's memory.
                memory.madvise(mmap.MADV_DONTNEED)


def _mapped(path: str) -> mmap.mmap:
    if not file_size(path):
        raise DataError(f"{path}: is empty; make it again")
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _parquet(path: str, memory: mmap.mmap) -> tuple[parquet.ParquetFile, list[str]]:
    """The file and the columns to read. Pages of a column are looked at as they are needed, not its whole chunk."""
    file = parquet.ParquetFile(pyarrow.BufferReader(pyarrow.py_buffer(memory)), pre_buffer=False)
    return file, _columns(path, file.schema_arrow)


def _parquet_batches(part: Part, memory: mmap.mmap) -> Iterator[pyarrow.RecordBatch]:
    file, columns = _parquet(part.path, memory)
    for index in range(part.start, part.stop):
        group = file.metadata.row_group(index)
        rows = max(1, min(group.num_rows, group.num_rows * _ROWS_BYTES // max(1, group.total_byte_size)))
        yield from file.iter_batches(rows, row_groups=[index], columns=columns)


def _arrow_batches(path: str, memory: mmap.mmap) -> Iterator[pyarrow.RecordBatch]:
    """Record batches of either Arrow format; their columns lie in the mapped file."""
    is_file = memory[:6] == b"ARROW1"
    open_ = ipc.open_file if is_file else ipc.open_stream
    schema = open_(memory).schema
    options = ipc.IpcReadOptions(included_fields=[schema.names.index(name) for name in _columns(path, schema)])
    reader = open_(memory, options=options)
    for batch in map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader:
        batch.validate()  # that its buffers are as long as its rows need, before anything looks into them
        yield batch


def _is_parquet(path: str) -> bool:
    return path.lower().endswith(".parquet")


def _columns(path: str, schema: pyarrow.Schema) -> list[str]:
    """Names of the columns that are read.

    Raises:
        DataError: there is none, or one is there twice.
    """
    names = [name for name in schema.names if name in KEYS]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise DataError(f"{path}: has more than one column {', '.join(sorted(repeated))}; rename the others")
    if not names:
        raise DataError(
            f"{path}: has no column that is read (its columns: {', '.join(schema.names)[:200]}); rename the columns to "
            f"those of a layout, among {', '.join(KEYS)}"
        )
    return names


@contextmanager
def _damage(path: str) -> Iterator[None]:
    try:
        yield
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: is damaged or of another format ({error}); make it again") from error
