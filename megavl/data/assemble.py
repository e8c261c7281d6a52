"""Assembly: pieces of documents into one micro-batch, images decoded."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megavl.batch import Batch, Kind
from megavl.config.model import ModelConfig
from megavl.data import image
from megavl.data.decode import decode
from megavl.data.errors import DataError
from megavl.data.format import IMAGE
from megavl.data.pack import Pack, Piece
from megavl.data.store import Store

_IGNORE = -100


class Assembler:
    """Turns packs into batches. Picklable: a worker process gets a copy, whose stores open their own files."""

    def __init__(
        self, stores: dict[Kind, tuple[Store, ...]], model: ModelConfig, seq_len: int, pad: int, with_pixels: bool
    ) -> None:
        """What every batch has in common.

        Args:
            pad: token id that fills a pack up; it is never supervised.
            with_pixels: decode images; otherwise `pixels` of every batch is None.
        """
        self._stores, self._model = stores, model
        self._seq_len, self._pad, self._with_pixels = seq_len, pad, with_pixels

    def __call__(self, kind: Kind, packs: Sequence[Pack]) -> Batch:
        """The packs laid end to end: T = len(packs) * seq_len tokens. Padding counts as a document of its own.

        Raises:
            DataError: an image does not decode, or a text token is the image placeholder or outside the vocabulary.
        """
        size = len(packs) * self._seq_len
        tokens = np.full(size, self._pad, dtype=np.int64)
        labels = np.full(size, _IGNORE, dtype=np.int64)
        borders, pixels = [0], []
        for number, pack in enumerate(packs):
            for piece in pack:
                start, stop = borders[-1], borders[-1] + piece.tokens
                store = self._stores[kind][piece.source]
                tokens[start:stop], labels[start:stop] = self._read(store, piece)
                if self._with_pixels and piece.images:
                    pixels += self._decode(store, piece)
                borders.append(stop)
            if borders[-1] < (number + 1) * self._seq_len:
                borders.append((number + 1) * self._seq_len)
        lengths = np.diff(borders)
        positions = np.arange(size) - np.repeat(borders[:-1], lengths)
        return Batch(
            tokens=torch.from_numpy(tokens),
            labels=torch.from_numpy(labels),
            positions=torch.from_numpy(positions),
            cu_seqlens=torch.tensor(borders, dtype=torch.int32),
            pixels=self._stack(pixels) if self._with_pixels else None,
        )

    def _read(self, store: Store, piece: Piece) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, labels) of a piece, each [piece.tokens]: label t is token t + 1 of the document where that is
        text."""  # One token more than the piece has: the target of its last position. Outside a text it stays unset.
        tokens = np.full(piece.tokens + 1, self._model.image_token_id, dtype=np.int64)
        targets = np.full(piece.tokens + 1, _IGNORE, dtype=np.int64)
        for sequence, offset, length in self._segments(store, piece.document):
            if store.modes[sequence] == IMAGE:
                continue
            first, last = max(offset, piece.start), min(offset + length, piece.stop + 1)
            if first < last:
                text = store.text(sequence, first - offset, last - offset)
                self._check(store, piece, text)
                tokens[first - piece.start : last - piece.start] = text
                targets[first - piece.start : last - piece.start] = text
        return tokens[:-1], targets[1:]

    def _decode(self, store: Store, piece: Piece) -> list[dict[str, Tensor]]:
        """Pixels of the images in a piece, in order. An image begins in a piece only if all of it is there."""
        pixels = []
        for sequence, offset, _ in self._segments(store, piece.document):
            if store.modes[sequence] == IMAGE and piece.start <= offset < piece.stop:
                try:
                    pixels.append(image.preprocess(decode(store.image(sequence)), self._model))
                except DataError as error:
                    raise DataError(
                        f"{store.where(piece.document)}: the image in its sequence {sequence} is broken: {error}; "
                        "remove the document or replace the image, and make the dataset again"
                    ) from error
        return pixels

    def _segments(self, store: Store, document: int) -> list[tuple[int, int, int]]:
        """(sequence, offset, length) of a document's segments, the last two in tokens of the document."""
        offset, segments = 0, []
        for sequence in range(int(store.documents[document]), int(store.documents[document + 1])):
            is_image = store.modes[sequence] == IMAGE
            length = self._model.image_tokens if is_image else int(store.lengths[sequence])
            segments.append((sequence, offset, length))
            offset += length
        return segments

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

    def _stack(self, pixels: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        sizes = image.tower_sizes(self._model)
        empty = {tower: torch.empty(0, 3, size, size) for tower, size in sizes.items()}
        stacked = {tower: torch.stack([one[tower] for one in pixels]) for tower in sizes} if pixels else empty
        return stacked  # tower -> [I, 3, S, S]
