"""Packing: pieces of documents into packs of a fixed number of tokens."""

from bisect import bisect_left, insort
from typing import NamedTuple

import numpy as np


class Piece(NamedTuple):
    """A part of a document that is trained on as one: the whole document, unless it does not fit a pack.

    start, stop: in tokens of the document as the model sees it, image tokens included
    supervised:  targets among them; the first text token after `stop` is one, the prediction of the last position
    tiles:       of its images, the overview of each included
    grids:       of all images of the document, also of those that other pieces hold: an index into
                 `megavl.config.tiles.Tiling.grids` each
    """

    source: int
    document: int
    start: int
    stop: int
    supervised: int
    images: int
    tiles: int
    grids: bytes

    @property
    def tokens(self) -> int:
        return self.stop - self.start


Pack = tuple[Piece, ...]


def best_fit(tokens: np.ndarray, tiles: np.ndarray, budget: int, max_tiles: int) -> list[list[int]]:
    """Indices of the pieces in each pack: a piece goes where the least room remains, or else into a new pack.

    Best-fit decreasing (Ding et al., "Fewer Truncations Improve Language Modeling", arXiv 2404.10830, section 3.2), in
    the order of the shares that a piece takes of both budgets.

    Args:
        tokens, tiles: int64 [any], sizes of each piece, at most `budget` and `max_tiles`.
        max_tiles: 0, and no piece has any, where there is no such budget.
    """
    packs: list[list[int]] = []
    count = len(tokens)
    order = np.argsort(-(tokens / budget + tiles / max(1, max_tiles)), kind="stable").tolist()
    # Of the packs with so many tiles left: room * count + number of the pack, ascending.
    rooms_by_tiles: list[list[int]] = [[] for _ in range(max_tiles + 1)]
    lengths, sizes = tokens.tolist(), tiles.tolist()
    for index in order:
        least, best, left = lengths[index] * count, None, max_tiles
        for tiles_left in range(sizes[index], max_tiles + 1):
            rooms = rooms_by_tiles[tiles_left]
            place = bisect_left(rooms, least)
            if place < len(rooms) and (best is None or rooms[place] < best):
                best, left = rooms[place], tiles_left
        if best is None:
            best = budget * count + len(packs)
            packs.append([])
        else:
            rooms = rooms_by_tiles[left]
            del rooms[bisect_left(rooms, best)]
        packs[best % count].append(index)
        if best - least >= count:  # a full pack takes nothing more
            insort(rooms_by_tiles[left - sizes[index]], best - least)
    return packs
