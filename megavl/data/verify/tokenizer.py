"""The tokenizer: the dataset was made with it, and it can read what is there."""

import numpy as np

from megavl.data.format import IMAGE
from megavl.data.store import Store
from megavl.data.tokenizer import load_tokenizer
from megavl.data.verify.found import Found

# Documents that are decoded, and tokens of each of their texts.
_DOCUMENTS = 64
_TOKENS = 4096


def check_tokenizer(store: Store, path: str, found: Found) -> None:
    """Compare identities, then decode the texts of some documents.

    Raises:
        DataError: the tokenizer cannot be loaded.
    """
    tokenizer = load_tokenizer(path)
    if other := store.meta.other_tokenizer(path, tokenizer.identity, tokenizer.vocab_size):
        found.add(f"it {other}")
        return
    for document in np.unique(np.linspace(0, len(store) - 1, _DOCUMENTS, dtype=np.int64)).tolist():
        for sequence in store.sequences(document):
            if store.modes[sequence] != IMAGE:
                tokens = store.text(sequence, 0, min(_TOKENS, int(store.lengths[sequence]))).tolist()
                try:
                    tokenizer.decode(tokens)
                except Exception as error:  # each library raises its own
                    found.add(
                        f"document {store.key(document)!r} (number {document}): its sequence {sequence} does not "
                        f"decode ({error})"
                    )
