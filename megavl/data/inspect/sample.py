"""Documents of a dataset to what is shown of them: text piece by piece, images in their places."""

import io
import warnings

import numpy as np
import pyarrow.compute
from PIL import Image

from megavl.config.tiles import Tiling
from megavl.data.decode import FORMATS
from megavl.data.errors import DataError
from megavl.data.format import IMAGE, PROMPT
from megavl.data.inspect.pieces import pieces
from megavl.data.inspect.shown import ImagePart, Part, Role, Sample, TextPart
from megavl.data.store import Store
from megavl.data.tokenizer import Tokenizer

# Documents whose keys are compared at a time.
_BLOCK = 65536


def find(store: Store, key: str) -> list[int]:
    """All documents with that key, in order."""
    found: list[int] = []
    for first in range(0, len(store), _BLOCK):
        keys = store.rows(first, min(first + _BLOCK, len(store)))["key"]
        same = pyarrow.compute.equal(keys, key).combine_chunks()
        found += (np.flatnonzero(np.asarray(same)) + first).tolist()
    return found


def choose(store: Store, number: int, seed: int) -> list[int]:
    """Random documents, ascending; all of them where there are no more than `number`."""
    return sorted(np.random.default_rng(seed).choice(len(store), min(number, len(store)), replace=False).tolist())


def read(
    store: Store, document: int, tokenizer: Tokenizer | None, most_tokens: int, tiling: Tiling | None = None
) -> Sample:
    """A document of a store, up to its first `most_tokens` tokens.

    Args:
        tokenizer: the one that made the store; without one, the pieces of a text are its token ids.
        tiling: of the model that is to read it, if there is one.

    Raises:
        DataError: there is no such document, or it is damaged.
    """
    if not 0 <= document < len(store):
        raise DataError(f"{store.prefix} has no document {document}; it has the documents 0 to {len(store) - 1}")
    sequences = store.sequences(document)
    lengths = {sequence: int(store.lengths[sequence]) for sequence in sequences if store.modes[sequence] != IMAGE}
    images = images_of(store, document, tiling)
    parts: list[Part] = []
    left = most_tokens
    for sequence in sequences:
        if not left:
            break
        if sequence in images:
            parts.append(images[sequence])
            continue
        taken = min(left, lengths[sequence])
        ids = store.text(sequence, 0, taken).tolist()
        role = Role.PROMPT if store.modes[sequence] == PROMPT else Role.TARGET
        roles = [role] * taken
        if sequence == sequences[0] and role is Role.TARGET:
            roles[0] = Role.NEVER
        parts.append(TextPart(tuple(ids), spell(store, document, ids, tokenizer), tuple(roles)))
        left -= taken
    tokens = sum(lengths.values())
    left_tokens = tokens - (most_tokens - left)
    return Sample(store, document, store.key(document), store.source(document), tokens, left_tokens, tuple(parts))


def images_of(store: Store, document: int, tiling: Tiling | None) -> dict[int, ImagePart]:
    """Sequence -> image, in the order of the document.

    Raises:
        DataError: the .meta file lists other images.
    """
    sequences = [sequence for sequence in store.sequences(document) if store.modes[sequence] == IMAGE]
    rows = store.rows(document, document + 1)["images"][0].as_py()
    if len(rows) != len(sequences):
        raise DataError(
            f"{store.where(document)}: it holds {len(sequences)} images, but {store.prefix}.meta lists {len(rows)}; "
            "the files do not belong together; make the dataset again"
        )
    parts = {}
    for sequence, row in zip(sequences, rows, strict=True):
        width, height, grid, tokens = row["width"], row["height"], None, None
        if tiling is not None:
            grid = tiling.grid(width, height, len(rows))
            tokens = int(tiling.tokens[tiling.grids.index(grid)])
        form = _form(store.image(sequence))
        parts[sequence] = ImagePart(sequence, width, height, row["bytes"], form, grid, tokens)
    return parts


def spell(store: Store, document: int, ids: list[int], tokenizer: Tokenizer | None) -> tuple[str, ...]:
    """The characters of each token; without a tokenizer its id and a space.

    Raises:
        DataError: a token is outside the vocabulary.
    """
    if tokenizer is None:
        return tuple(f"{id} " for id in ids)
    if ids and not 0 <= min(ids) <= max(ids) < tokenizer.vocab_size:
        raise DataError(
            f"{store.where(document)}: its tokens are {min(ids)} to {max(ids)}, but the vocabulary is 0 to "
            f"{tokenizer.vocab_size - 1}; `python tools/verify_data.py {store.prefix}` lists what is wrong"
        )
    return tuple(pieces(ids, tokenizer))


def _form(data: bytes) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes, which nobody unpacks here
            return Image.open(io.BytesIO(data), formats=FORMATS).format
    except Exception:  # Pillow's parsers raise OSError, ValueError, SyntaxError, struct.error, ...
        return "unknown"
