"""Writes a dataset: `<prefix>.bin` and `<prefix>.idx`, byte for byte Megatron's, and `<prefix>.meta`."""

import contextlib
import shutil
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from megavl.data.checksum import PartHash
from megavl.data.encoded import EncodedDocument, EncodedImage, EncodedText
from megavl.data.errors import DataError
from megavl.data.format import IMAGE, PROMPT, TEXT, token_dtype
from megavl.data.index import IndexWriter
from megavl.data.meta import Meta, RowWriter, write_meta
from megavl.data.output import new_dataset, refuse_existing
from megavl.data.tokenizer import Tokenizer

_BLOCK_BYTES = 1 << 20


class StoreWriter:
    """Writes a dataset; as a context manager it appears whole under its name at the end, or not at all.

    It starts as a text dataset and becomes a multimodal one with the first image or prompt. Memory does not grow with
    what is written.
    """

    def __init__(self, prefix: str, tokenizer: Tokenizer, overwrite: bool = False) -> None:
        """Nothing is written before the `with` block is entered.

        Raises:
            DataError: files of that prefix exist and `overwrite` is false.
        """
        if not overwrite:
            refuse_existing(prefix)
        self._prefix = prefix
        self._tokenizer, self._vocab_size = tokenizer.identity, tokenizer.vocab_size
        self._templates: set[str] = set()
        self._multimodal = False
        self._dtype = token_dtype(self._vocab_size, multimodal=False)
        self._hash = PartHash()
        self._open = contextlib.ExitStack()
        self.image_bytes = 0

    def add(self, *documents: EncodedDocument) -> None:
        """Append documents; many at once cost little more than one.

        Raises:
            DataError: one is empty or holds a token outside the vocabulary.
        """
        lengths, modes, ends = [], [], []
        # Neighbouring texts are checked and written together.
        texts: list[tuple[EncodedDocument, np.ndarray]] = []
        for document in documents:
            if not document.sequences:
                raise DataError(f"{document.source}: document {document.key} is empty; leave it out")
            for sequence in document.sequences:
                match sequence:
                    case EncodedText(tokens=tokens, supervised=supervised):
                        texts.append((document, tokens))
                        lengths.append(len(tokens))
                        modes.append(TEXT if supervised else PROMPT)
                    case EncodedImage(data=data):
                        self._write_texts(texts)
                        texts = []
                        lengths.append(self._write_image(data))
                        modes.append(IMAGE)
            ends.append(len(lengths))
            self._rows.append(document)
            if document.template is not None:
                self._templates.add(document.template)
        if PROMPT in modes:
            self._promote()
        self._write_texts(texts)
        self._index.append(np.array(lengths, np.int32), np.array(modes, np.int8), np.array(ends, np.int64))

    @property
    def documents(self) -> int:
        """Written so far."""
        return self._index.documents

    @property
    def tokens(self) -> int:
        """Written so far, of text that is learned or only read."""
        return self._index.tokens

    @property
    def images(self) -> int:
        """Written so far; `image_bytes` are those of their files."""
        return self._index.images

    def __enter__(self) -> "StoreWriter":
        with contextlib.ExitStack() as stack:
            self._temporary = stack.enter_context(new_dataset(self._prefix))
            directory = Path(self._prefix).parent
            self._index = stack.enter_context(IndexWriter(directory))
            self._rows = stack.enter_context(RowWriter(directory))
            self._bin = stack.enter_context(open(self._temporary.bin, "w+b"))
            self._open = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        with self._open:
            if error is not None:
                raise error
            self._finish()

    def _finish(self) -> None:
        if not self._index.documents:
            raise DataError(f"{self._prefix}: there is no document to write, and an empty dataset cannot be read")
        self._bin.close()
        batches = self._rows.batches()
        meta = Meta(
            tokenizer=self._tokenizer,
            vocab_size=self._vocab_size,
            templates=tuple(sorted(self._templates)),
            multimodal=self._multimodal,
            images=self._index.images,
            bin_parts=tuple(self._hash.parts()),
            idx_sha256=self._index.write(self._temporary.idx, self._dtype, self._multimodal),
            row_parts=tuple(self._rows.parts),
        )
        write_meta(self._temporary.meta, meta, batches)

    def _write(self, data: bytes | np.ndarray) -> None:
        self._bin.write(data)
        self._hash.update(data)

    def _write_texts(self, texts: list[tuple[EncodedDocument, np.ndarray]]) -> None:
        if not texts:
            return
        for document, tokens in texts:
            if not len(tokens):
                raise DataError(
                    f"{document.source}: document {document.key} holds an empty text sequence; leave it out"
                )
        together = np.concatenate([tokens for _, tokens in texts])
        if together.min() < 0 or together.max() >= self._vocab_size:
            self._refuse(texts)
        self._write(together.astype(self._dtype))

    def _refuse(self, texts: list[tuple[EncodedDocument, np.ndarray]]) -> None:
        for document, tokens in texts:
            if tokens.min() < 0 or tokens.max() >= self._vocab_size:
                raise DataError(
                    f"{document.source}: document {document.key} holds the token ids {tokens.min()} to {tokens.max()}, "
                    f"but the vocabulary is 0 to {self._vocab_size - 1}; they would wrap around or train a row that is "
                    "not there; use the tokenizer that made the tokens"
                )

    def _write_image(self, data: bytes) -> int:
        """Elements of an image: element 0 counts the pad bytes that make the file's bytes whole int32 elements."""
        self._promote()
        self.image_bytes += len(data)
        pad = -len(data) % 4
        self._write(struct.pack("<i", pad))
        self._write(data)
        self._write(bytes(pad))
        return 1 + (len(data) + pad) // 4

    def _promote(self) -> None:
        """From text to multimodal: the modes were kept all along, but the elements may be too narrow."""
        if self._multimodal:
            return
        self._multimodal = True
        narrow, self._dtype = self._dtype, token_dtype(self._vocab_size, multimodal=True)
        if narrow != self._dtype:
            with tempfile.TemporaryFile(dir=Path(self._prefix).parent) as written:
                self._bin.seek(0)
                shutil.copyfileobj(self._bin, written)
                written.seek(0)
                self._bin.seek(0)
                self._bin.truncate()
                self._hash = PartHash()
                for elements in widened(written, narrow, self._dtype):
                    self._write(elements)


def widened(file: BinaryIO, narrow: np.dtype, wide: np.dtype) -> Iterator[np.ndarray]:
    """The elements of a .bin file, in blocks of a wider type."""
    while block := file.read(_BLOCK_BYTES):
        yield np.frombuffer(block, narrow).astype(wide)
