"""Which reader reads a file, and which files `--input` means."""

import os
from collections.abc import Iterator, Sequence

from megavl.data.errors import DataError
from megavl.data.readers import epub, html, json_array, jsonl, notebook, table, webdataset
from megavl.data.readers.reader import Reader

# One module per input format: add a new one here.
READERS: tuple[Reader, ...] = (jsonl, json_array, table, webdataset, html, epub, notebook)

_BY_SUFFIX = {suffix: reader for reader in READERS for suffix in reader.SUFFIXES}


def reader_of(path: str) -> Reader:
    """The reader of a file, known by the longest suffix that its name ends with.

    Raises:
        DataError: no reader has its suffix.
    """
    name = os.path.basename(path).lower()
    suffix = max((suffix for suffix in _BY_SUFFIX if name.endswith(suffix)), key=len, default=None)
    if suffix is None:
        raise DataError(f"{path}: no reader for a file of this name; the known suffixes are {', '.join(_BY_SUFFIX)}")
    return _BY_SUFFIX[suffix]


def input_files(inputs: Sequence[str]) -> list[str]:
    """The files of `--input`, in its order: a file is itself, a folder all files below it that have a reader, sorted.

    Raises:
        DataError: an input does not exist, is a file without a reader, or a folder without a file that has one.
    """
    return [file for path in inputs for file in (_below(path) if os.path.isdir(path) else _itself(path))]


def _itself(path: str) -> list[str]:
    if not os.path.isfile(path):
        what = "is neither a file nor a folder" if os.path.exists(path) else "no such file or folder"
        raise DataError(f"{path}: {what}; check --input")
    reader_of(path)
    return [path]


def _below(folder: str) -> list[str]:
    files = sorted(_known(folder))
    if not files:
        raise DataError(
            f"{folder}: no file in this folder has a reader; the known suffixes are {', '.join(_BY_SUFFIX)}"
        )
    return files


def _known(folder: str) -> Iterator[str]:
    for root, _, names in os.walk(folder, onerror=_refuse):
        # Names that begin with a dot belong to tools and file systems.
        for name in names:
            if not name.startswith(".") and name.lower().endswith(tuple(_BY_SUFFIX)):
                yield os.path.join(root, name)


def _refuse(error: OSError) -> None:
    raise DataError(f"{error.filename}: cannot be read ({error.strerror}); check --input") from error
