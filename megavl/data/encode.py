"""Documents to what the store keeps: token ids, and images that are known to decode."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from megavl.data.decode import decoded_size
from megavl.data.document import Document, Image, Segment, Text
from megavl.data.encoded import EncodedDocument, EncodedImage, EncodedText
from megavl.data.errors import DataError
from megavl.data.tokenizer import Tokenizer


def encode(documents: Sequence[Document], tokenizer: Tokenizer) -> list[EncodedDocument | DataError]:
    """Each document's sequences, or what is wrong with it. All text is tokenised in one call.

    Texts and special tokens in a row are one sequence where they are learned alike, and texts in a row one text. The
    end-of-sequence token ends every document once: in its last sequence of text, learned if that is, or in a sequence
    of its own behind a last image.
    """
    drafts = [_draft(document, tokenizer) for document in documents]
    runs = [run for draft in drafts if isinstance(draft, list) for run in draft if isinstance(run, _Run)]
    tokens = iter(tokenizer.encode_batch([part for run in runs for part in run.parts if isinstance(part, str)]))
    return [
        _finish(document, draft, tokens) if isinstance(draft, list) else draft
        for document, draft in zip(documents, drafts, strict=True)
    ]


@dataclass(frozen=True)
class _Run:
    """Texts to tokenise and ids of special tokens, in a row and learned alike."""

    supervised: bool
    parts: list[str | int]


def _draft(document: Document, tokenizer: Tokenizer) -> list[_Run | EncodedImage] | DataError:
    runs: list[_Run | EncodedImage] = []
    try:
        for supervised, segments in groupby(document.segments, _supervision):
            if supervised is None:
                runs += map(_image, segments)
            else:
                runs.append(_Run(supervised, _parts(segments, tokenizer)))
    except DataError as error:
        return DataError(f"{document.source}: document {document.key}: {error}")
    match runs:
        case [*_, _Run(parts=parts)]:
            if parts[-1] != tokenizer.eos:
                parts.append(tokenizer.eos)
        case _:
            runs.append(_Run(True, [tokenizer.eos]))
    return runs


def _supervision(segment: Segment) -> bool | None:
    return None if isinstance(segment, Image) else segment.supervised


def _parts(segments: Iterator[Segment], tokenizer: Tokenizer) -> list[str | int]:
    parts: list[str | int] = []
    for kind, alike in groupby(segments, type):
        if kind is Text:
            parts.append("".join(segment.text for segment in alike))
        else:
            parts += [tokenizer.eos if token.name is None else tokenizer.token(token.name) for token in alike]
    return parts


def _image(segment: Image) -> EncodedImage:
    try:
        width, height = decoded_size(segment.data)
    except DataError as error:
        raise DataError(f"image {segment.name}: {error}; replace or remove the image") from error
    return EncodedImage(segment.data, width, height)


def _finish(document: Document, draft: list[_Run | EncodedImage], tokens: Iterator[np.ndarray]) -> EncodedDocument:
    """`tokens` yields the ids of the texts of all documents, in order."""
    sequences: list[EncodedText | EncodedImage] = []
    for run in draft:
        if isinstance(run, EncodedImage):
            sequences.append(run)
            continue
        ids = [next(tokens) if isinstance(part, str) else np.array([part], dtype=np.int32) for part in run.parts]
        text = np.concatenate(ids)
        # A text of characters that the tokenizer drops leaves nothing.
        if len(text):
            sequences.append(EncodedText(text, run.supervised))
    return EncodedDocument(document.key, document.source, tuple(sequences), document.template)
