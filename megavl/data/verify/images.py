"""Images: the .meta file lists those of the index, and what is stored decodes to what it lists."""

import numpy as np
import pyarrow as pa
import pyarrow.compute

from megavl.data.decode import decoded_size
from megavl.data.errors import DataError
from megavl.data.format import IMAGE
from megavl.data.store import Store
from megavl.data.verify.found import Found

# An image sequence holds the number of pad bytes, the file, and so many pad bytes: int32 elements.
_ELEMENT_BYTES = 4


def check_rows(store: Store, first: int, stop: int, found: Found) -> None:
    """Rows of a range of documents against the index: how many images each has, and how long they are.

    Raises:
        DataError: the rows are damaged.
    """
    begin, is_image, held = _held(store, first, stop)
    rows = store.rows(first, stop)["images"].combine_chunks()
    listed = np.asarray(pa.compute.list_value_length(rows)).astype(np.int64)
    for place in np.flatnonzero(held != listed).tolist():
        found.add(f"{_name(store, first + place)}: {listed[place]} images are listed, but it holds {held[place]}")
    # The images of the other documents, in the index and in the rows alike.
    same = held == listed
    sequences = begin + np.flatnonzero(is_image)[np.repeat(same, held)]
    listed_bytes = np.asarray(rows.flatten().field("bytes"))[np.repeat(same, listed)]
    elements = 1 - (-listed_bytes // _ELEMENT_BYTES)
    for place in np.flatnonzero(elements != store.lengths[sequences]).tolist():
        sequence = int(sequences[place])
        document = int(np.searchsorted(store.documents, sequence, side="right")) - 1
        found.add(
            f"{_name(store, document)}: the image in its sequence {sequence} is listed with {listed_bytes[place]} "
            f"bytes, which take {elements[place]} elements, but has {store.lengths[sequence]}"
        )


def check_images(store: Store, first: int, stop: int, every: int, found: Found) -> None:
    """Decode the images of a range of documents, or of each `every`-th one of the dataset.

    Raises:
        DataError: the rows are damaged.
    """
    _, _, held = _held(store, first, stop)
    for document in (first + np.flatnonzero(held)).tolist():
        if document % every:
            continue
        rows = store.rows(document, document + 1)["images"][0].as_py()
        sequences = [sequence for sequence in store.sequences(document) if store.modes[sequence] == IMAGE]
        # Where there are more or fewer, check_rows says so.
        for sequence, row in zip(sequences, rows, strict=False):
            if problem := _problem(store, sequence, row):
                found.add(f"{_name(store, document)}: the image in its sequence {sequence}: {problem}")


def _held(store: Store, first: int, stop: int) -> tuple[int, np.ndarray, np.ndarray]:
    """(first sequence of a range of documents, which of their sequences are images, how many each document has)."""
    begins, ends = store.spans(np.arange(first, stop))
    begin = int(begins[0])
    is_image = store.modes[begin : int(ends[-1])] == IMAGE
    return begin, is_image, np.add.reduceat(is_image.astype(np.int64), begins - begin)


def _name(store: Store, document: int) -> str:
    return f"document {store.key(document)!r} (number {document})"


def _problem(store: Store, sequence: int, row: dict[str, int]) -> str | None:
    try:
        data = store.image(sequence)
        size = decoded_size(data)
    except DataError as error:
        return str(error)
    actual, listed = (*size, len(data)), (row["width"], row["height"], row["bytes"])
    if actual == listed:
        return None
    return "{} x {} pixels in {} bytes are listed, but it has {} x {} in {}".format(*listed, *actual)
