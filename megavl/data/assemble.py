"""Assembly: pieces of documents into one micro-batch, images decoded."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from megavl.batch import BadImage, Batch, ImagePlaces, Kind, tile_share
from megavl.config.model import ModelConfig
from megavl.config.tiles import Grid, Tiling
from megavl.config.tokens import IGNORE_INDEX
from megavl.data import image
from megavl.data.decode import decode
from megavl.data.errors import DataError
from megavl.data.format import IMAGE, TEXT
from megavl.data.pack import Pack, Piece
from megavl.data.store import Store

# Memory for the pixels of some tiles: uint8 [tiles, 3, S, S].
Room = Callable[[int], Tensor]


@dataclass(frozen=True)
class ImageShare:
    """The tiles that this rank makes: all, or its share (`megavl.batch.tile_share`) among the tensor ranks. It decodes
    the images that have one of them."""

    rank: int = 0
    size: int = 1


@dataclass(frozen=True)
class _Place:
    """An image of a micro-batch: in which pack, as which image of it, and where it is stored."""

    pack: int
    image: int
    store: Store
    document: int
    sequence: int
    grid: Grid


@dataclass(frozen=True)
class Assembled:
    """A micro-batch, and the images in it that had to be replaced."""

    batch: Batch
    bad_images: tuple[BadImage, ...]

    @property
    def pixels(self) -> Tensor | None:
        return self.batch.pixels

    def pin_memory(self) -> "Assembled":
        """A DataLoader calls it, in a thread of its own."""
        return replace(self, batch=self.batch.pin_memory())

    def __reduce__(self) -> tuple:
        """From a worker process pixels come as shared memory, the rest by value: shared memory is an open file, and a
        step may have hundreds of micro-batches."""
        batch, places = self.batch, self.batch.places
        fields = (batch.tokens, batch.labels, batch.positions, batch.cu_seqlens, batch.supervised)
        image_fields = (places.features, places.newlines, places.separators)
        arrays = tuple(tuple(field.numpy() for field in group) for group in (fields, image_fields))
        return _arrived, (*arrays, batch.lengths, batch.packs, batch.grids, batch.pixels, self.bad_images)


@dataclass(frozen=True)
class Decoded:
    """Tiles without their micro-batches: uint8 [tiles, 3, S, S], and the images among them that had to be replaced."""

    pixels: Tensor
    bad_images: tuple[BadImage, ...]

    def pin_memory(self) -> "Decoded":
        """A DataLoader calls it, in a thread of its own."""
        return replace(self, pixels=self.pixels.pin_memory())


def _arrived(
    fields: tuple[np.ndarray, ...],
    image_fields: tuple[np.ndarray, ...],
    lengths: tuple[int, ...],
    packs: int,
    grids: tuple[Grid, ...],
    pixels: Tensor | None,
    bad_images: tuple[BadImage, ...],
) -> Assembled:
    places = ImagePlaces(*map(torch.from_numpy, image_fields))
    return Assembled(Batch(*map(torch.from_numpy, fields), lengths, packs, grids, places, pixels), bad_images)


class Assembler:
    """Turns packs into batches. Picklable: a worker process gets a copy, whose stores open their own files."""

    def __init__(
        self,
        stores: dict[Kind, tuple[Store, ...]],
        model: ModelConfig,
        seq_len: int,
        pad: int,
        images: ImageShare | None,
    ) -> None:
        """What every batch has in common.

        Args:
            pad: token id that fills a pack up; it is never supervised.
            images: which to decode; with None, `pixels` of every batch is None.
        """
        self._stores, self._model, self._tiling = stores, model, Tiling(model)
        self._seq_len, self._pad, self._images = seq_len, pad, images

    def __call__(self, kind: Kind, first: int, packs: Sequence[Pack], room: Room | None = None) -> Assembled:
        """The packs laid end to end: T = len(packs) * seq_len tokens. Padding counts as a document of its own.

        The pieces say which grids their images have, which a worker process could not know without reading all sizes.
        An image that cannot be decoded becomes a blank one; the text around it stays.

        Args:
            first: number of the first pack in the global batch.
            room: where the pixels go; needed where images are decoded.

        Raises:
            DataError: a dataset is damaged there; a text token is the image placeholder or outside the vocabulary.
        """
        size = len(packs) * self._seq_len
        tokens = np.full(size, self._pad, dtype=np.int64)
        labels = np.full(size, IGNORE_INDEX, dtype=np.int64)
        borders = [0]
        for number, pack in enumerate(packs):
            for piece in pack:
                start, stop = borders[-1], borders[-1] + piece.tokens
                tokens[start:stop], labels[start:stop] = self._read(self._stores[kind][piece.source], piece)
                borders.append(stop)
            if borders[-1] < (number + 1) * self._seq_len:
                borders.append((number + 1) * self._seq_len)
        places = list(self._places(kind, packs))
        pixels, bad_images = None, ()
        if self._images is not None:
            if kind == "text":
                pixels = image.empty_pixels(self._model, tiles=0)
            else:
                share = tile_share(sum(place.grid.tiles for place in places), self._images.rank, self._images.size)
                pixels = room(max(1, len(share)))
                if not share:
                    image.write_blank(self._model, pixels)
                bad_images = self._decode(first, places, share, pixels)
        batch = Batch.of(
            self._tiling,
            tokens=torch.from_numpy(tokens),
            labels=torch.from_numpy(labels),
            lengths=np.diff(borders).tolist(),
            packs=len(packs),
            grids=[place.grid for place in places],
            pixels=pixels,
        )
        return Assembled(batch, bad_images)

    def decode(self, kind: Kind, first: int, packs: Sequence[Pack], tiles: range, room: Room) -> Decoded:
        """Some of the tiles of the packs, alone.

        Args:
            first, room: as in `__call__`.
            tiles: a run of them, counted from the first tile of the packs.

        Raises:
            DataError: a dataset is damaged there.
        """
        pixels = room(len(tiles))
        return Decoded(pixels, self._decode(first, list(self._places(kind, packs)), tiles, pixels))

    def _read(self, store: Store, piece: Piece) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, labels) of a piece, each [piece.tokens]: label t is token t + 1 of the document where that is text
        to learn."""
        # One token more than the piece has: the target of its last position. Outside a text it stays unset.
        tokens = np.full(piece.tokens + 1, self._model.image_token_id, dtype=np.int64)
        targets = np.full(piece.tokens + 1, IGNORE_INDEX, dtype=np.int64)
        for sequence, offset, length, grid in self._segments(store, piece):
            if grid is not None:
                continue
            first, last = max(offset, piece.start), min(offset + length, piece.stop + 1)
            if first < last:
                text = store.text(sequence, first - offset, last - offset)
                self._check(store, piece, text)
                tokens[first - piece.start : last - piece.start] = text
                if store.modes[sequence] == TEXT:
                    targets[first - piece.start : last - piece.start] = text
        return tokens[:-1], targets[1:]

    def _decode(self, first: int, places: Sequence[_Place], mine: range, pixels: Tensor) -> tuple[BadImage, ...]:
        """Write the tiles `mine` of those of all places, in order. Returns the images that were replaced."""
        borders = np.cumsum([0, *(place.grid.tiles for place in places)]).tolist()
        bad_images = []
        for place, start, stop in zip(places, borders, borders[1:], strict=False):
            here = range(max(start, mine.start), min(stop, mine.stop))
            if not here:
                continue
            into = pixels[here.start - mine.start : here.stop - mine.start]
            try:
                picture = decode(place.store.image(place.sequence))
            except DataError as error:
                key = place.store.key(place.document)
                bad_images.append(
                    BadImage(first + place.pack, place.image, place.store.prefix, key, place.sequence, str(error))
                )
                image.write_blank(self._model, into)
                continue
            image.preprocess(picture, self._model, place.grid, range(here.start - start, here.stop - start), into)
        return tuple(bad_images)

    def _places(self, kind: Kind, packs: Sequence[Pack]) -> Iterator[_Place]:
        """Every image, in order. An image is in the piece that holds its first token: it is never cut."""
        for number, pack in enumerate(packs):
            images = 0
            for piece in pack:
                if not piece.images:
                    continue
                store = self._stores[kind][piece.source]
                for sequence, offset, _, grid in self._segments(store, piece):
                    if grid is not None and piece.start <= offset < piece.stop:
                        yield _Place(number, images, store, piece.document, sequence, grid)
                        images += 1

    def _segments(self, store: Store, piece: Piece) -> Iterator[tuple[int, int, int, Grid | None]]:
        """(sequence, offset, length, grid of an image) of the segments of a piece's document, offset and length in
        tokens of the document."""
        offset, of_images = 0, iter(piece.grids)
        for sequence in store.sequences(piece.document):
            grid = None
            if store.modes[sequence] == IMAGE:
                number = next(of_images)
                grid, length = self._tiling.grids[number], int(self._tiling.tokens[number])
            else:
                length = int(store.lengths[sequence])
            yield sequence, offset, length, grid
            offset += length

    def _check(self, store: Store, piece: Piece, text: np.ndarray) -> None:
        vocab_size, placeholder = self._model.decoder.vocab_size, self._model.image_token_id
        if text.max() >= vocab_size or text.min() < 0:
            raise DataError(
                f"{store.where(piece.document)}: its tokens are {text.min()} to {text.max()}, but the model's "
                f"vocabulary is 0 to {vocab_size - 1}; the dataset is damaged or of another model; make it again"
            )
        if (text == placeholder).any():
            raise DataError(
                f"{store.where(piece.document)}: its text holds the token {placeholder}, which is "
                "model.image_token_id; an image would be expected there; "
                "remove the document, or choose a placeholder that no text has"
            )
