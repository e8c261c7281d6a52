"""Stream: the endless sequence of packs of one modality, a pure function of the seed.

Documents are drawn from the sources by weight and packed window by window: a window is as many documents as give a
fixed number of tokens, and no pack crosses its border. Where a window starts is a few numbers per source, so that the
stream goes on from a saved position at once; without one it is found by packing the windows before, from lengths alone.
"""

import hashlib
import json
import math
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter

import numpy as np

from megavl.config.tiles import Tiling
from megavl.data import blend
from megavl.data.cut import pieces
from megavl.data.pack import Pack, Piece, best_fit
from megavl.data.shuffle import permute
from megavl.data.source import Source
from megavl.data.store import Store

# Packs that a window's documents would fill without a gap. Best-fit leaves 0.1 % of 1024 packs empty, 0.2 % of 512 and
# 0.6 % of 128 (docs/data.md); a longer window only makes the wait for the first batch longer.
_WINDOW = 1024
# Goes up when other packs come out of the same inputs: positions saved before are then found to be of another stream.
_VERSION = 1
# Which random order a key is of.
_DOCUMENTS, _PACKS = 0, 1


@dataclass(frozen=True)
class Start:
    """Where a window starts: its number, its first pack, and what was drawn from each source before it."""

    window: int
    pack: int
    documents: tuple[int, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Use:
    """What was read of a source: documents (counted when they begin) and tokens, as the model sees them."""

    documents: int
    tokens: int


class Stream:
    """Packs of the documents in some stores, numbered from 0 without end."""

    def __init__(
        self,
        stores: tuple[Store, ...],
        weights: tuple[float, ...],
        seq_len: int,
        tiling: Tiling,
        key: tuple[int, ...],
        max_tiles: int | None = None,
    ) -> None:
        """No document is drawn before the first pack is asked for.

        Args:
            weights: of each store, its share of the tokens on any positive scale.
            seq_len: tokens of a pack.
            tiling: of the model; an image with any of its grids keeps both budgets of a pack.
            key: what the random orders derive from.
            max_tiles: tiles of a pack at most; None leaves the tokens to bound them.

        Raises:
            DataError: the sizes of the images in a store are not those of its files.
        """
        self.sources = tuple(
            Source(store, number, tiling, (*key, _DOCUMENTS, number)) for number, store in enumerate(stores)
        )
        self._weights, self._key, self._seq_len = weights, key, seq_len
        fits = int((seq_len * tiling.tiles // tiling.tokens).max())
        self._max_tiles = fits if max_tiles is None else min(max_tiles, fits)
        # Where the tokens bound the tiles anyway, they need not be counted.
        self._counts_tiles = self._max_tiles < fits
        datasets = [[store.meta.idx_sha256, weight] for store, weight in zip(stores, weights, strict=True)]
        facts = [_VERSION, _WINDOW, key, seq_len, tiling.facts, self._max_tiles, datasets]
        self._identity = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        self._origin = Start(0, 0, (0,) * len(stores), (0,) * len(stores))
        # Of consecutive windows; all but the last one have been packed.
        self._starts = [self._origin]
        self._packed: tuple[int, list[Pack]] = (-1, [])

    def packs(self, first: int, stop: int) -> list[Pack]:
        """The packs `first` to `stop`, each the pieces in it in the order of the draws.

        Ascending numbers are cheap; a jump ahead packs the windows between, a jump back before the position that the
        stream was resumed at packs those from the first one on.
        """
        packs: list[Pack] = []
        while (number := first + len(packs)) < stop:
            start = self._start(number)
            packs += self._window(start)[number - start.pack : stop - start.pack]
        return packs

    def position(self, pack: int) -> dict:
        """Where the window of a pack starts, in JSON types: with it, `resume` finds that pack at once."""
        facts = {
            name: list(fact) if isinstance(fact, tuple) else fact for name, fact in vars(self._start(pack)).items()
        }
        return {"stream": self._identity, **facts}

    def resume(self, position: dict) -> bool:
        """Go on from a saved position. False, and nothing changes, where it is of a stream with other packs."""
        if position["stream"] != self._identity:
            return False
        start = Start(position["window"], position["pack"], tuple(position["documents"]), tuple(position["tokens"]))
        if start.window > self._starts[-1].window:
            self._starts = [start]
        return True

    def read(self, packs: int) -> list[Use]:
        """What the first packs hold of each source."""
        start = self._start(packs)
        documents, tokens = list(start.documents), list(start.tokens)
        for pack in self._window(start)[: packs - start.pack]:
            for piece in pack:
                documents[piece.source] += piece.start == 0
                tokens[piece.source] += piece.tokens
        return [Use(*counts) for counts in zip(documents, tokens, strict=True)]

    def expect(self, packs: int) -> list[Use]:
        """What so many packs will hold of each source: its share, of packs that are as full as those of the first
        window."""
        shares = [weight / sum(self._weights) for weight in self._weights]
        tokens = [packs * self._tokens_per_pack * share for share in shares]
        return [
            Use(round(amount / source.mean_tokens), round(amount))
            for source, amount in zip(self.sources, tokens, strict=True)
        ]

    @cached_property
    def _tokens_per_pack(self) -> float:
        _, following = self._pack(self._origin)
        return sum(following.tokens) / following.pack

    def _start(self, pack: int) -> Start:
        """The start of the window that holds a pack."""
        if pack < self._starts[0].pack:
            self._starts, self._packed = [self._origin], (-1, [])
        while self._starts[-1].pack <= pack:
            self._window(self._starts[-1])
        return self._starts[bisect_right(self._starts, pack, key=attrgetter("pack")) - 1]

    def _window(self, start: Start) -> list[Pack]:
        if self._packed[0] != start.window:
            packs, following = self._pack(start)
            if start is self._starts[-1]:
                self._starts.append(following)
            self._packed = (start.window, packs)
        return self._packed[1]

    def _pack(self, start: Start) -> tuple[list[Pack], Start]:
        """The packs of a window, and the start of the next one."""
        draws, documents_drawn, tokens_drawn = self._draws(start)
        drawn = pieces(draws, self.sources, self._seq_len, self._max_tiles)
        tokens, tiles = drawn["stop"] - drawn["start"], drawn["tiles"] * self._counts_tiles
        chosen = best_fit(tokens, tiles, self._seq_len, self._max_tiles * self._counts_tiles)
        as_pieces = [Piece(*numbers, grids) for numbers, grids in zip(drawn.tolist(), self._grids(drawn), strict=True)]
        # Best-fit makes packs of one long document first, and packs of many short ones last.
        order = permute(np.arange(len(chosen)), len(chosen), (*self._key, _PACKS, start.window)).tolist()
        packs = [tuple(as_pieces[index] for index in sorted(chosen[number])) for number in order]
        return packs, Start(start.window + 1, start.pack + len(packs), documents_drawn, tokens_drawn)

    def _grids(self, drawn: np.ndarray) -> list[bytes]:
        """Of the whole document of each piece, the grids of its images."""
        grids = np.full(len(drawn), b"", dtype=object)
        for number, source in enumerate(self.sources):
            if source.has_images:
                mine = drawn["source"] == number
                grids[mine] = source.grids(drawn["document"][mine])
        return grids.tolist()

    def _draws(self, start: Start) -> tuple[np.ndarray, tuple[int, ...], tuple[int, ...]]:
        """The documents of a window in the order of the draws, DRAW [any]; documents and tokens drawn with them."""
        documents, tokens = np.array(start.documents), np.array(start.tokens)
        wanted, drawn = _WINDOW * self._seq_len, []
        while wanted > 0:
            offered = [
                source.draws(first, self._offer(source, weight, wanted))
                for source, weight, first in zip(self.sources, self._weights, documents.tolist(), strict=True)
            ]
            order = blend.merge(self._weights, tokens.tolist(), [draws["tokens"] for draws in offered])
            draws = np.concatenate(offered)[order]
            # The document that completes the window is its last.
            draws = draws[: np.searchsorted(np.cumsum(draws["tokens"]), wanted) + 1]
            np.add.at(documents, draws["source"], 1)
            np.add.at(tokens, draws["source"], draws["tokens"])
            wanted -= int(draws["tokens"].sum())
            drawn.append(draws)
        return np.concatenate(drawn), tuple(documents.tolist()), tuple(tokens.tolist())

    def _offer(self, source: Source, weight: float, wanted: int) -> int:
        """Documents of a source that `wanted` tokens of the blend will need, or a few more."""
        return math.ceil(1.1 * wanted * weight / sum(self._weights) / source.mean_tokens) + 8
