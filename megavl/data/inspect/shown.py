"""What is shown of a dataset: documents and packs, with the loss mask on every token."""

from dataclasses import dataclass
from enum import StrEnum

from megavl.config.tiles import Grid
from megavl.data.store import Store


class Role(StrEnum):
    """What a token is to the loss: learned, read only, or without anything before it that could predict it."""

    TARGET = "target"
    PROMPT = "prompt"
    NEVER = "never"


@dataclass(frozen=True)
class TextPart:
    """Tokens of one text sequence, of equal length: ids, the characters of each, what each is to the loss."""

    ids: tuple[int, ...]
    pieces: tuple[str, ...]
    roles: tuple[Role, ...]


@dataclass(frozen=True)
class ImagePart:
    """One image.

    sequence:     where the store keeps it
    form:         PNG, JPEG, ..., or "unknown" for bytes of no image
    grid, tokens: how the model takes it; None where no model is known
    """

    sequence: int
    width: int
    height: int
    size_bytes: int
    form: str
    grid: Grid | None
    tokens: int | None

    @property
    def taken(self) -> str:
        """How the model takes it, in words: "3 x 2 tiles, 1,415 tokens", columns first as a width is; nothing where no
        model is known."""
        if self.grid is None:
            return ""
        tiles = f"{self.grid.columns} x {self.grid.rows} tiles, " * (self.grid.tiles > 1)
        return f"{tiles}{self.tokens:,} tokens"


Part = TextPart | ImagePart


@dataclass(frozen=True)
class Sample:
    """One document, or its beginning.

    tokens:      text tokens of the whole document
    left_tokens: those behind what is shown
    """

    store: Store
    document: int
    key: str
    source: str
    tokens: int
    left_tokens: int
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class PackedPiece:
    """A document, or a part of one, in a pack. All numbers are of tokens as the model sees them.

    start, stop: in the document, whose length is `document_tokens`
    parts:       with the tokens that each takes
    beyond:      what the last position is to predict behind a cut: a token's id and its characters
    """

    store: Store
    document: int
    key: str
    start: int
    stop: int
    document_tokens: int
    parts: tuple[tuple[int, Part], ...]
    beyond: tuple[int, str] | None


@dataclass(frozen=True)
class PackSample:
    """One pack. `number`: its place in the global batch of the step; `kind`: text or multimodal; `max_tiles`: of a pack
    at most, where the run says so."""

    step: int
    kind: str
    number: int
    seq_len: int
    max_tiles: int | None
    tiles: int
    target_tokens: int
    pieces: tuple[PackedPiece, ...]
