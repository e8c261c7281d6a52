"""A lock that one process holds at a time, on one file system; the kernel takes it back when the process ends."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from megavl.data.errors import DataError


@contextlib.contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file `path`, which is removed at the end.

    Args:
        what: what the lock keeps others from, for the error.

    Raises:
        DataError: another process holds it, or the file cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    except OSError as error:
        raise DataError(f"{error.filename} cannot be written ({error.strerror}); check the output prefix") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A holder that ended just now has removed the file, and the next process would make another one.
            is_current = path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno()))
        except BlockingIOError:
            is_current = False
        if not is_current:
            file.seek(0)
            raise DataError(f"{what} by {file.read().strip() or 'another process'}; wait for its end, or end it")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
