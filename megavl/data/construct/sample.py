"""What a construction makes of its files."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Sample:
    """An image and the text that it stands for.

    key:    names the sample: its file, and its place in there
    image:  bytes of an image file
    suffix: of that file's format, such as ".png"
    """

    key: str
    image: bytes
    suffix: str
    text: str


@dataclass(frozen=True)
class Dropped:
    """What a rule left out. `reason` is one of the construction's few, by which drops are counted; `detail` is of this
    one alone."""

    where: str
    reason: str
    detail: str = ""


class Construction(Protocol):
    """A rule from files to samples; a frozen dataclass of its options, which its repr shows."""

    suffixes: tuple[str, ...]

    def samples(self, paths: Sequence[str]) -> Iterator[Sample | Dropped]:
        """The samples of the files in order, the same whenever and wherever this runs.

        Raises:
            DataError: what it works with is missing on this machine. A bad file is `Dropped`.
        """
        ...
