"""Packing: documents into packs of a fixed number of tokens, without ever splitting an image."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

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


def cut(lengths: np.ndarray, is_image: np.ndarray, budget: int) -> list[tuple[int, int]]:
    """Parts of a document that are no longer than `budget`: text is cut anywhere, an image stays whole.

    Args:
        lengths: int [segments], tokens of each segment; that of an image is at most `budget`.
        is_image: bool [segments].

    Returns:
        (start, stop) of each part, in tokens of the document, in order and without gaps.
    """
    borders, position = [0], 0
    for length, whole in zip(lengths.tolist(), is_image.tolist(), strict=True):
        stop = position + length
        if whole and stop - borders[-1] > budget:
            borders.append(position)
        # The borders within a text segment; none where the segment fits.
        borders += range(borders[-1] + budget, stop, budget)
        position = stop
    return list(zip(borders, [*borders[1:], position], strict=True))


def count(lengths: np.ndarray, is_image: np.ndarray, parts: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """(supervised, images) of each part of a document, from its lengths alone.

    A target is a text token with a token of the document before it. Where that is the last token of a part, the target
    counts for that part.
    """
    edges = np.concatenate(([0], np.cumsum(lengths)))
    text = np.concatenate(([0], np.cumsum(np.where(is_image, 0, lengths))))
    images = np.concatenate(([0], np.cumsum(is_image)))
    starts, stops = np.array(parts).T
    # Text tokens before a position: linear within each segment.
    targets = np.interp(stops + 1, edges, text) - np.interp(starts + 1, edges, text)
    inside = images[np.searchsorted(edges, stops)] - images[np.searchsorted(edges, starts)]
    return list(zip(targets.astype(int).tolist(), inside.tolist(), strict=True))


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
