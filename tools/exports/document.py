"""One document of a packed batch, as a model that packs nothing reads it."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from megavl.batch import Batch
from megavl.config.model import ModelConfig
from megavl.config.tiles import Grid, Tiling


@dataclass(frozen=True)
class Document:
    """
    tokens, labels: int64 [T]
    grids:          of its images, in order
    pixels:         uint8 [tiles, 3, S, S], as in `Batch`
    """

    tokens: Tensor
    labels: Tensor
    grids: tuple[Grid, ...]
    pixels: Tensor


def documents(batch: Batch, config: ModelConfig) -> Iterator[Document]:
    """Those of a batch, each with its own images."""
    tiling, grids, tile = Tiling(config), list(batch.grids), 0
    for start, stop in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
        tokens = batch.tokens[start:stop]
        placeholders, mine = int((tokens == config.image_token_id).sum()), []
        while sum(len(tiling.layout(grid)) for grid in mine) < placeholders:
            mine.append(grids.pop(0))
        tiles = sum(grid.tiles for grid in mine)
        yield Document(tokens, batch.labels[start:stop], tuple(mine), batch.pixels[tile : tile + tiles])
        tile += tiles
