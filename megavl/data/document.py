"""Document: the noun that every input format becomes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Text:
    """A run of text."""

    text: str


@dataclass(frozen=True)
class Image:
    """An image as it was stored: `data` are the bytes of its file (PNG, JPEG, ...), `name` is what errors call it."""

    data: bytes
    name: str


@dataclass(frozen=True)
class Document:
    """Text and images in reading order.

    key:    names the document in errors and reports
    source: the file that it was read from
    """

    key: str
    source: str
    segments: tuple[Text | Image, ...]
