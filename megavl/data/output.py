"""A dataset appears whole under its name, or not at all."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from megavl.data.errors import DataError
from megavl.data.format import Paths, dataset_paths


def refuse_existing(prefix: str) -> None:
    """Raises DataError where files of a dataset have this prefix already."""
    existing = [path for path in dataset_paths(prefix) if os.path.exists(path)]
    if existing:
        raise DataError(f"{', '.join(existing)} exist already; choose another output prefix or pass --overwrite")


@contextlib.contextmanager
def new_dataset(prefix: str) -> Iterator[Paths]:
    """Temporary names to write the files of a dataset to. They get their own names when the block ends, and are removed
    when it raises.

    Raises:
        DataError: the prefix ends without a name, or lies where nothing can be written.
    """
    paths = dataset_paths(prefix)
    temporary = Paths(*(f"{path}.tmp" for path in paths))
    try:
        Path(prefix).parent.mkdir(parents=True, exist_ok=True)
        Path(temporary.bin).touch()
    except OSError as error:
        raise DataError(f"{error.filename} cannot be written ({error.strerror}); check the output prefix") from error
    try:
        yield temporary
        # An old .meta goes first and the new one comes last: whatever stops this half-way leaves no dataset that opens.
        with contextlib.suppress(FileNotFoundError):
            os.remove(paths.meta)
        for old, new in zip(temporary, paths, strict=True):
            os.replace(old, new)
    finally:
        for path in temporary:
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)
