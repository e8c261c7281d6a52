"""Images: the .meta file lists those of the index, and what is stored decodes to what it lists."""

from megavl.data.decode import decode
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
    rows = store.rows(first, stop)["images"]
    for document, images in zip(range(first, stop), rows.to_pylist(), strict=True):
        sequences = _images(store, document)
        if len(images) != len(sequences):
            found.add(
                f"document {store.key(document)!r} (number {document}): {len(images)} images are listed, but it "
                f"holds {len(sequences)}"
            )
            continue
        for sequence, image in zip(sequences, images, strict=True):
            elements = 1 - (-image["bytes"] // _ELEMENT_BYTES)
            if elements != store.lengths[sequence]:
                found.add(
                    f"document {store.key(document)!r} (number {document}): the image in its sequence {sequence} is "
                    f"listed with {image['bytes']} bytes, which take {elements} elements, but has "
                    f"{store.lengths[sequence]}"
                )


def check_images(store: Store, first: int, stop: int, every: int, found: Found) -> None:
    """Decode the images of a range of documents, or of each `every`-th one of the dataset.

    Raises:
        DataError: the rows are damaged.
    """
    for document in range(first + -first % every, stop, every):
        rows = store.rows(document, document + 1)["images"][0].as_py()
        # Where there are more or fewer, check_rows says so.
        for sequence, row in zip(_images(store, document), rows, strict=False):
            if problem := _problem(store, sequence, row):
                found.add(
                    f"document {store.key(document)!r} (number {document}): the image in its sequence {sequence}: "
                    f"{problem}"
                )


def _images(store: Store, document: int) -> list[int]:
    """Image sequences of a document."""
    return [sequence for sequence in store.sequences(document) if store.modes[sequence] == IMAGE]


def _problem(store: Store, sequence: int, row: dict[str, int]) -> str | None:
    try:
        data = store.image(sequence)
        size = decode(data).size
    except DataError as error:
        return str(error)
    actual, listed = (*size, len(data)), (row["width"], row["height"], row["bytes"])
    if actual == listed:
        return None
    return "{} x {} pixels in {} bytes are listed, but it has {} x {} in {}".format(*listed, *actual)
