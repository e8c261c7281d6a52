"""Made-up datasets, written without a tokenizer."""

import random
from pathlib import Path

from megavl.data.encoded import EncodedDocument, EncodedImage
from megavl.data.format import IMAGE
from megavl.data.store import Store
from megavl.data.writer import StoreWriter
from tests.data.conftest import encoded_text, image_bytes

FILES = ("bin", "idx", "meta")


class Vocabulary:
    """What a writer needs of a tokenizer."""

    eos = 0
    identity = "f" * 64

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size


def documents(vocab_size: int, number: int = 40) -> list[EncodedDocument]:
    random_ = random.Random(1)
    lengths = [random_.randint(1, 50) for _ in range(number)]
    return [
        EncodedDocument(f"key {index}", "file", (encoded_text(*random_.choices(range(vocab_size), k=length)),))
        for index, length in enumerate(lengths)
    ]


def mixed(number: int = 12) -> list[EncodedDocument]:
    """Interleaved documents whose image bytes need 0 to 3 bytes of padding."""
    random_ = random.Random(2)
    result = []
    for index in range(number):
        data = image_bytes(index, (9, 5)) + bytes(index % 4)
        sequences = (encoded_text(1, 2, index), EncodedImage(data, 9, 5), encoded_text(random_.randrange(300)))
        result.append(EncodedDocument(f"key {index}", "file", sequences[index % 2 :]))
    return result


def write(prefix, items, vocab_size=300, overwrite=False) -> Store:
    with StoreWriter(str(prefix), Vocabulary(vocab_size), overwrite) as writer:
        for item in items:
            writer.add(item)
    return Store(str(prefix))


def contents(prefix) -> list[bytes]:
    """Bytes of the .bin and the .idx file."""
    return [Path(f"{prefix}.{suffix}").read_bytes() for suffix in FILES[:2]]


def records(store: Store) -> list[tuple]:
    """Everything in it: key, source, image sizes, and each sequence as its mode and its tokens or bytes."""
    table = store.rows(0, len(store)).to_pylist()
    return [
        (*row.values(), [(int(store.modes[one]), read(store, one)) for one in store.sequences(document)])
        for document, row in enumerate(table)
    ]


def read(store: Store, sequence: int) -> bytes | list[int]:
    if store.modes[sequence] == IMAGE:
        return store.image(sequence)
    return store.text(sequence, 0, int(store.lengths[sequence])).tolist()
