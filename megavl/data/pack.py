"""Packing: documents into packs of a fixed number of tokens, without ever splitting an image."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

# First-fit looks at this many packs: the oldest is closed when another one opens.
_OPEN_PACKS = 32


class Piece(NamedTuple):
    """A part of a document that is trained on as one: the whole document, unless it is longer than a pack.

    start, stop: in tokens of the document as the model sees it, image tokens included
    supervised:  targets among them; the first text token after `stop` is one, the prediction of the last position
    """

    source: int
    document: int
    start: int
    stop: int
    supervised: int
    images: int

    @property
    def tokens(self) -> int:
        return self.stop - self.start


Pack = tuple[Piece, ...]


class Part(NamedTuple):
    """A cut of one document: `Piece` without its place."""

    start: int
    stop: int
    supervised: int
    images: int


def cut(segments: Iterable[tuple[int, bool]], budget: int) -> list[Part]:
    """Parts of a document that are no longer than `budget`, in order and without gaps.

    Text is cut anywhere, an image stays whole. A part's last position still predicts the token behind the cut, so that
    the supervised tokens of all parts are those of the document.

    Args:
        segments: (tokens, whether it is an image) of each segment; an image has at most `budget` tokens.
    """
    parts: list[Part] = []
    start = position = text = images = 0
    starts_with_text = False
    for length, is_image in segments:
        while length:
            if budget - (position - start) < (length if is_image else 1):
                parts.append(Part(start, position, text - starts_with_text + (not is_image), images))
                start, text, images = position, 0, 0
            if position == start:
                starts_with_text = not is_image
            taken = length if is_image else min(length, budget - (position - start))
            if is_image:
                images += 1
            else:
                text += taken
            position += taken
            length -= taken
    parts.append(Part(start, position, text - starts_with_text, images))
    return parts


def first_fit(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of the pieces in each pack: a piece goes into the oldest open pack that has room for it."""
    packs: list[list[int]] = []
    rooms: list[int] = []
    for index, length in enumerate(lengths):
        for slot, room in enumerate(rooms):
            if length <= room:
                packs[slot - len(rooms)].append(index)
                rooms[slot] = room - length
                break
        else:
            packs.append([index])
            rooms = [*rooms[1 - _OPEN_PACKS :], budget - length]
    return packs
