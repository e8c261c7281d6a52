"""What the readers' tests share: files read to the end, and a picture's bytes."""

import json
from pathlib import Path

from megavl.data.document import Document
from megavl.data.errors import DataError
from megavl.data.readers.reader import ReadOptions
from megavl.data.readers.registry import reader_of

PICTURE = b"bytes of a picture, which no reader looks into"


def read(path, part_bytes: int = 1 << 30, **options) -> list[Document | DataError]:
    """Everything in a file, in order."""
    reader = reader_of(str(path))
    parts = reader.split(str(path), part_bytes)
    return [document for part in parts for document in reader.read(part, ReadOptions(**options))]


def documents(path, **options) -> list[Document]:
    """Documents of a file without errors."""
    found = read(path, **options)
    assert not [error for error in found if isinstance(error, DataError)]
    return found


def write_jsonl(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path
