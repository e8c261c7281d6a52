"""Statistics: what a dataset holds, counted from its index and its .meta file without reading a token."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute

from megavl.config.tiles import Tiling
from megavl.data.format import IMAGE, PROMPT, TEXT
from megavl.data.grids import choose
from megavl.data.inspect.histogram import Histogram
from megavl.data.store import Store

# Documents that are counted at a time.
_BLOCK = 65536


@dataclass
class Share:
    """What one source file gave."""

    documents: int = 0
    tokens: int = 0
    images: int = 0
    tiles: int = 0


@dataclass
class Statistics:
    """Counts of one dataset.

    tokens:        of text, prompts and the end-of-sequence tokens included; an image has none of its own
    prompt_tokens: those among them that are read but never learned
    target_tokens: those that are learned: no prompt, and not the first of a document
    stored_bytes:  size of the .bin file
    image_bytes:   sizes of the image files in it
    image_sides:   longer side of every image, in pixels
    model_tokens:  of the images, as the model takes them; 0, like the tiles, where no model is known
    tiles:         of the images, overviews included; an image of DeepSeek-VL is one
    image_tiles:   of every image
    sources:       source file -> its share
    """

    prefix: str
    multimodal: bool
    vocab_size: int
    documents: int = 0
    sequences: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    target_tokens: int = 0
    images: int = 0
    stored_bytes: int = 0
    image_bytes: int = 0
    document_tokens: Histogram = field(default_factory=Histogram)
    document_images: Histogram = field(default_factory=Histogram)
    image_sides: Histogram = field(default_factory=Histogram)
    model_tokens: int = 0
    tiles: int = 0
    image_tiles: Histogram = field(default_factory=Histogram)
    sources: dict[str, Share] = field(default_factory=lambda: defaultdict(Share))


def count(store: Store, report: Callable[[int], None], tiling: Tiling | None = None) -> Statistics:
    """Statistics of a dataset, in memory that does not grow with its documents.

    Args:
        report: called with the number of documents that were counted since the last call.
        tiling: of the model that is to read it, if there is one.

    Raises:
        DataError: the index is damaged, or the rows list other images.
    """
    result = Statistics(store.prefix, store.multimodal, store.meta.vocab_size)
    result.documents, result.sequences = len(store), len(store.lengths)
    result.stored_bytes = int(store.pointers[-1]) + int(store.lengths[-1]) * store.dtype.itemsize
    for first in range(0, len(store), _BLOCK):
        stop = min(first + _BLOCK, len(store))
        _add(result, store, first, stop, tiling)
        report(stop - first)
    return result


def _add(result: Statistics, store: Store, first: int, stop: int, tiling: Tiling | None) -> None:
    begins, ends = store.spans(np.arange(first, stop))
    start, end = int(begins[0]), int(ends[-1])
    modes, lengths = store.modes[start:end], store.lengths[start:end].astype(np.int64)
    begins = begins - start
    tokens = np.add.reduceat(np.where(modes == IMAGE, 0, lengths), begins)
    images = np.add.reduceat((modes == IMAGE).astype(np.int64), begins)
    result.tokens += int(tokens.sum())
    result.prompt_tokens += int(lengths[modes == PROMPT].sum())
    result.target_tokens += int(lengths[modes == TEXT].sum()) - int((modes[begins] == TEXT).sum())
    result.images += int(images.sum())
    result.document_tokens.add(tokens)
    result.document_images.add(images)
    rows = store.rows(first, stop)
    _add_images(result, rows)
    tiles = np.zeros_like(images)
    if tiling is not None:
        grids = choose(rows["images"].combine_chunks(), images, tiling, f"{store.prefix}: documents from {first} on")
        result.model_tokens += int(tiling.tokens[grids].sum())
        result.image_tiles.add(tiling.tiles[grids])
        np.add.at(tiles, np.repeat(np.arange(len(images)), images), tiling.tiles[grids])
    result.tiles += int(tiles.sum())
    _add_sources(result, rows, tokens, images, tiles)


def _add_images(result: Statistics, rows: pa.Table) -> None:
    images = pa.compute.list_flatten(rows["images"].combine_chunks())
    width, height, size_bytes = (np.asarray(images.field(name)) for name in ("width", "height", "bytes"))
    result.image_bytes += int(size_bytes.sum(dtype=np.int64))
    result.image_sides.add(np.maximum(width, height))


def _add_sources(result: Statistics, rows: pa.Table, *counts: np.ndarray) -> None:
    """`counts` are the tokens, images and tiles of each document."""
    sources = rows["source"].combine_chunks().dictionary_encode()
    places = np.asarray(sources.indices)
    columns = (np.bincount(places, weights=values).astype(np.int64).tolist() for values in counts)
    for name, documents, tokens, images, tiles in zip(
        sources.dictionary.to_pylist(), np.bincount(places).tolist(), *columns, strict=True
    ):
        share = result.sources[name]
        share.documents += documents
        share.tokens += tokens
        share.images += images
        share.tiles += tiles
