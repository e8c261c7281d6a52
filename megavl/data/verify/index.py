"""The index, entry by entry: sequences lie end to end, documents follow one another, every mode is known."""

import numpy as np

from megavl.data.format import IMAGE, PROMPT, TEXT
from megavl.data.store import Store
from megavl.data.verify.found import Found


def check_sequences(store: Store, first: int, stop: int, found: Found) -> None:
    """Lengths, places and modes of a range of sequences."""
    lengths = store.lengths[first:stop].astype(np.int64)
    pointers, modes = store.pointers[first:stop], store.modes[first:stop]
    # Where each sequence must begin: at the end of the one before it.
    before = store.pointers[first - 1] + store.lengths[first - 1] * np.int64(store.dtype.itemsize) if first else 0
    expected = np.concatenate(([before], pointers[:-1] + lengths[:-1] * store.dtype.itemsize))
    for place in np.flatnonzero(pointers != expected).tolist():
        found.add(f"sequence {first + place} begins at byte {pointers[place]}, not at {expected[place]}")
    # An image has its number of pad bytes and at least one element of its file.
    for place in np.flatnonzero(lengths < np.where(modes == IMAGE, 2, 1)).tolist():
        found.add(f"sequence {first + place} has {lengths[place]} elements")
    for place in np.flatnonzero(~np.isin(modes, (TEXT, IMAGE, PROMPT))).tolist():
        found.add(f"sequence {first + place} has the mode {modes[place]}, not {TEXT}, {IMAGE} or {PROMPT}")


def check_documents(store: Store, first: int, stop: int, found: Found) -> None:
    """Borders of a range of documents: each has a sequence at least, and all of them are there."""
    begins, ends = store.documents[first:stop], store.documents[first + 1 : stop + 1]
    wrong = (begins < 0) | (ends > len(store.lengths)) | (begins >= ends)
    for place in np.flatnonzero(wrong).tolist():
        found.add(f"document {first + place} is the sequences {begins[place]} to {ends[place]} of {len(store.lengths)}")
