"""Grids: how the images of a dataset are tiled, from the sizes that its .meta file lists; no image is read."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute

from megavl.config.tiles import Tiling
from megavl.data.errors import DataError
from megavl.data.format import IMAGE
from megavl.data.store import Store


@dataclass(frozen=True)
class Grids:
    """The grid of each image of a dataset, one byte per sequence.

    of_sequence: uint8 [sequences], index into `Tiling.grids`; 0 where a sequence is no image
    images:      int64 [grids], how many images have each
    """

    of_sequence: np.ndarray
    images: np.ndarray


def image_grids(store: Store, tiling: Tiling) -> Grids:
    """The grids of all images; rows are read only where images can differ in them.

    Raises:
        DataError: the rows are damaged, or list other images than the index holds.
    """
    sequences, images = len(store.modes), int(np.count_nonzero(store.modes == IMAGE))
    if not images or len(tiling.grids) == 1:
        counts = np.zeros(len(tiling.grids), dtype=np.int64)
        counts[0] = images
        # A view of one zero, read as often as there are sequences.
        return Grids(np.broadcast_to(np.uint8(0), (sequences,)), counts)
    of_sequence, counts, first = np.zeros(sequences, dtype=np.uint8), np.zeros(len(tiling.grids), dtype=np.int64), 0
    for rows in store.batches():
        stop = first + len(rows)
        begins, ends = store.spans(np.arange(first, stop))
        is_image = store.modes[begins[0] : ends[-1]] == IMAGE
        held = np.add.reduceat(is_image, begins - begins[0], dtype=np.int64)
        chosen = choose(rows["images"], held, tiling, f"{store.prefix}: documents {first} to {stop - 1}")
        of_sequence[begins[0] : ends[-1]][is_image] = chosen
        counts += np.bincount(chosen, minlength=len(counts))
        first = stop
    return Grids(of_sequence, counts)


def choose(rows: pa.ListArray, held: np.ndarray, tiling: Tiling, where: str) -> np.ndarray:
    """Grids of the images of some documents, in order: uint8 [any].

    Args:
        rows: of each document, as the column `images` of the .meta file.
        held: int64 [documents], how many images the index has of each.
        where: how an error names the documents.

    Raises:
        DataError: the rows list other images than the index holds.
    """
    listed = np.asarray(pa.compute.list_value_length(rows))
    if not np.array_equal(listed, held):
        raise DataError(
            f"{where}: the .meta file lists {listed.sum()} images, or in other documents, and the index holds "
            f"{held.sum()}; the files do not belong together; copy or make all of them again"
        )
    images = rows.flatten()
    widths, heights = (np.asarray(images.field(side)) for side in ("width", "height"))
    return tiling.choose(widths, heights, np.repeat(held, held))
