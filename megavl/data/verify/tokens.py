"""Token ids, every one: inside the vocabulary."""

from collections.abc import Iterator

import numpy as np

from megavl.data.errors import DataError
from megavl.data.format import IMAGE
from megavl.data.store import Store
from megavl.data.verify.found import Found

# Tokens that are in memory at a time.
_TOKENS = 1 << 22


def check_tokens(store: Store, first: int, stop: int, found: Found) -> None:
    """The texts among a range of sequences.

    Raises:
        DataError: the .bin file was cut off meanwhile.
    """
    pointers, vocab_size = store.pointers[first:stop], store.meta.vocab_size
    last = -1
    for begin, tokens in _texts(store, first, stop):
        wrong = np.flatnonzero((tokens < 0) | (tokens >= vocab_size))
        places = begin + wrong * store.dtype.itemsize
        sequences = first + np.searchsorted(pointers, places, side="right") - 1
        for sequence in np.unique(sequences).tolist():
            # Said once of a sequence that is longer than what is read at a time.
            if sequence != last:
                ids = tokens[wrong[sequences == sequence]]
                document = int(np.searchsorted(store.documents, sequence, side="right")) - 1
                found.add(
                    f"document {store.key(document)!r} (number {document}): its sequence {sequence} holds the ids "
                    f"{ids.min()} to {ids.max()}, but the vocabulary is 0 to {vocab_size - 1}"
                )
            last = sequence


def _texts(store: Store, first: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
    """(first byte, tokens) of what lies between images, a bounded number of tokens at a time."""
    is_text = np.concatenate(([False], store.modes[first:stop] != IMAGE, [False]))
    changes = first + np.flatnonzero(is_text[1:] != is_text[:-1])
    with open(store.paths.bin, "rb") as file:
        for run, end in zip(changes[::2].tolist(), changes[1::2].tolist(), strict=True):
            begin = int(store.pointers[run])
            left = (int(store.pointers[end - 1]) - begin) // store.dtype.itemsize + int(store.lengths[end - 1])
            file.seek(begin)
            while left:
                tokens = np.fromfile(file, store.dtype, min(left, _TOKENS))
                if not len(tokens):
                    raise DataError(
                        f"{store.paths.bin} ends before byte {begin + left * store.dtype.itemsize}; it was cut off "
                        "while it was read"
                    )
                yield begin, tokens
                begin, left = begin + tokens.nbytes, left - len(tokens)
