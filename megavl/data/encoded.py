"""Documents as they go into a dataset: token ids and image files in reading order."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class EncodedText:
    """One text sequence. tokens: int32 or int64 [n]; `supervised`: whether they are learned or only read."""

    tokens: np.ndarray
    supervised: bool = True


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """One image sequence: the bytes of the image's file, and its size in pixels."""

    data: bytes
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class EncodedDocument:
    """The sequences of a document.

    key:      names the document in errors and reports
    source:   the file that it was read from
    template: name of the one that wrote it, if it is a conversation
    """

    key: str
    source: str
    sequences: tuple[EncodedText | EncodedImage, ...]
    template: str | None = None
