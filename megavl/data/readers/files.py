"""Files that readers open: the input itself, whatever its compression, and the images that its records name."""

import io
import os
import stat
from pathlib import Path
from typing import BinaryIO

import pyarrow

from megavl.data.errors import DataError
from megavl.data.readers.reader import ReadOptions, too_large

# Read at a time: at the 8 KiB of Python, going from line to line takes a twentieth of preprocessing.
_BUFFER_BYTES = 1 << 20
_COMPRESSIONS = {".gz": "gzip", ".tgz": "gzip", ".zst": "zstd"}


def compression(path: str) -> str | None:
    """The name of a file's codec, by its suffix; None where it is not compressed."""
    return _COMPRESSIONS.get(Path(path).suffix.lower())


def open_input(path: str) -> BinaryIO:
    """A file's bytes, decompressed as they are read where its suffix says that it is compressed.

    Raises:
        DataError: the file cannot be opened. Reading damaged compression raises OSError.
    """
    try:
        codec = compression(path)
        raw = pyarrow.input_stream(path, compression=codec) if codec else io.FileIO(path)
        return io.BufferedReader(raw, _BUFFER_BYTES)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); check --input") from error


def read_whole(path: str, options: ReadOptions) -> bytes:
    """The bytes of a file that is one record.

    Raises:
        DataError: the file cannot be read. One that is too large for a record raises it without naming the file.
    """
    with open_input(path) as file:
        try:
            data = file.read(options.max_record_bytes + 1)
        except OSError as error:
            raise DataError(f"cannot be read ({error.strerror or error}); make it again") from error
    if len(data) > options.max_record_bytes:
        raise too_large(options)
    return data


def read_image(folder: str, reference: str, max_bytes: int) -> bytes:
    """The image file that a record names, which lies in the folder of the input file or below it.

    Raises:
        DataError: the reference is no relative path or leads out of the folder, or its file is missing, no regular file
            or larger than `max_bytes`. The message does not name the record.
    """
    if "://" in reference or reference.startswith("data:"):
        raise DataError(
            f"image {reference[:120]} is a URL, and nothing is downloaded; fetch the images first (img2dataset does) "
            "and name their files"
        )
    full = os.path.join(folder, reference)
    outside = DataError(
        f"image {reference} is outside of {folder or '.'}, the folder of the input file; name images by relative paths "
        "below that folder, and put the files there themselves where a link leads out of it"
    )
    if os.path.isabs(reference) or Path(os.path.normpath(reference)).parts[:1] == ("..",):
        raise outside
    try:
        real = os.path.realpath(full, strict=True)
        status = os.stat(real)
        if not Path(real).is_relative_to(os.path.realpath(folder)):
            raise outside
        if stat.S_ISREG(status.st_mode) and status.st_size <= max_bytes:
            return Path(real).read_bytes()
    except OSError as error:
        raise DataError(
            f"image {full} cannot be read ({error.strerror}); image paths are relative to the folder of the input file"
        ) from error
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"image {full} is not a regular file; name the file of an image")
    raise DataError(
        f"image {full} has {status.st_size:,} bytes, more than --max-record-bytes {max_bytes:,}; remove it, or raise "
        "the limit"
    )
