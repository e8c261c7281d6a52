"""Document: the noun that every input format becomes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Text:
    """A run of text. `supervised`: whether the model learns to write it, or only reads it (a user's turn)."""

    text: str
    supervised: bool = True


@dataclass(frozen=True)
class Token:
    """One special token by its spelling, such as `<|ref|>`: only a template or a format writes it, never a document's
    own text, where the same characters stay text.

    Without a name it is the tokenizer's end-of-sequence token, which every tokenizer has and each spells its own way.
    """

    name: str | None = None
    supervised: bool = True


@dataclass(frozen=True)
class Image:
    """An image as it was stored: `data` are the bytes of its file (PNG, JPEG, ...), `name` is what errors call it."""

    data: bytes
    name: str


Segment = Text | Token | Image


@dataclass(frozen=True)
class Document:
    """Text and images in reading order.

    key:      names the document in errors and reports
    source:   the file that it was read from
    template: name of the one that wrote it, if it is a conversation
    """

    key: str
    source: str
    segments: tuple[Segment, ...]
    template: str | None = None
