"""Batch: the one noun that crosses rooms."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from megavl.config.tiles import Grid

Kind = Literal["text", "multimodal"]


@dataclass(frozen=True)
class Batch:
    """One micro-batch: packs of documents laid end to end, `T` tokens in all.

    tokens:     int64 [T]; an image is a run of placeholders, as many as its grid takes
    labels:     int64 [T]; the token that position t should predict, -100 where nothing is supervised
    positions:  int64 [T]; restart at 0 with every document
    cu_seqlens: int32 [N + 1]; document n is tokens[cu_seqlens[n]:cu_seqlens[n + 1]]; the last entry is T
    packs:      how many; each has T / packs tokens
    grids:      of each image, in the order of the placeholders; DeepSeek-VL's have no local tile
    pixels:     tower name ("siglip", "sam") -> float32 [tiles, 3, S, S], normalised: the tiles of all images, of each
                the overview first; there may be none. None on ranks that do not hold the stem. Where the tensor ranks
                share the tiles (`parallel.vision: sharded`), only those of `tile_share`
    """

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    packs: int
    grids: tuple[Grid, ...]
    pixels: Mapping[str, Tensor] | None

    @property
    def tiles(self) -> int:
        """Tiles of all images, wherever they are encoded."""
        return sum(grid.tiles for grid in self.grids)

    def to(self, device: torch.device) -> "Batch":
        """The same micro-batch on another device; copies from pinned memory do not wait."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The same micro-batch in page-locked memory, from which copies to a GPU do not wait. A DataLoader calls it, in
        a thread of its own."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        return replace(
            self,
            tokens=change(self.tokens),
            labels=change(self.labels),
            positions=change(self.positions),
            cu_seqlens=change(self.cu_seqlens),
            pixels=self.pixels and {tower: change(pixels) for tower, pixels in self.pixels.items()},
        )


def tile_share(tiles: int, rank: int, size: int) -> range:
    """Which tiles of a micro-batch tensor rank `rank` of `size` decodes and encodes, where the ranks share them: equal
    runs, of which the last ones are shorter or empty."""
    each = -(-tiles // size)
    return range(min(rank * each, tiles), min((rank + 1) * each, tiles))


@dataclass(frozen=True)
class BadImage:
    """An image that could not be decoded, for which a blank one stands in.

    pack, image:     where it was met: number of the pack in the global batch, of the image in the pack
    dataset, document, sequence: where it is stored: prefix, key of the document, sequence of the dataset
    reason:          why it could not be decoded
    """

    pack: int
    image: int
    dataset: str
    document: str
    sequence: int
    reason: str


@dataclass(frozen=True)
class StepBatch:
    """What one rank feeds into one optimizer step, with the facts of the whole global batch.

    supervised_tokens, tokens, images, tiles, squared_tokens count the global batch, not this rank's part.
    squared_tokens: sum over documents of their length squared, which packed attention costs.
    bad_images: those that this rank has replaced, not the global batch's.
    """

    step: int
    kind: Kind
    micro_batches: tuple[Batch, ...]
    supervised_tokens: int
    tokens: int
    images: int
    tiles: int
    squared_tokens: int
    bad_images: tuple[BadImage, ...] = ()
