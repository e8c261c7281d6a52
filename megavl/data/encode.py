"""Document to what the store keeps: token ids, and images that are known to decode."""

from itertools import groupby

import numpy as np

from megavl.data.decode import decode
from megavl.data.document import Document, Image, Text
from megavl.data.encoded import EncodedDocument, EncodedImage, EncodedText
from megavl.data.errors import DataError
from megavl.data.tokenizer import Tokenizer


def encode(document: Document, tokenizer: Tokenizer) -> EncodedDocument:
    """Sequences of a document: neighbouring texts are one, and the last text sequence ends with end-of-sequence.

    A document that ends with an image gets a last text sequence of that token alone.

    Raises:
        DataError: an image does not decode.
    """
    sequences: list[list[int] | EncodedImage] = []
    for kind, segments in groupby(document.segments, type):
        if kind is Text:
            tokens = tokenizer.encode("".join(segment.text for segment in segments))
            # A text of characters that the tokenizer drops leaves nothing.
            sequences += [tokens] if tokens else []
        else:
            sequences += [_check(document, segment) for segment in segments]
    if not sequences or isinstance(sequences[-1], EncodedImage):
        sequences.append([])
    sequences[-1].append(tokenizer.eos)
    return EncodedDocument(
        document.key,
        document.source,
        tuple(
            one if isinstance(one, EncodedImage) else EncodedText(np.array(one, dtype=np.int64)) for one in sequences
        ),
    )


def _check(document: Document, segment: Image) -> EncodedImage:
    try:
        width, height = decode(segment.data).size
    except DataError as error:
        raise DataError(
            f"{document.source}: document {document.key}: image {segment.name}: {error}; replace or remove the image"
        ) from error
    return EncodedImage(segment.data, width, height)
