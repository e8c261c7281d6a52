"""Tokenizers: text to token ids."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megavl.data import fast_tokenizer
from megavl.data.errors import DataError
from megavl.data.fast_tokenizer import FastTokenizer
from megavl.data.probes import probes
from megavl.data.sentencepiece_model import SentencePieceModel
from megavl.data.tokenizer_json import TokenizerJson
from megavl.data.tokenizer_library import Library

# Special tokens that an error message lists; a vocabulary may have hundreds.
_LISTED = 20


class Tokenizer:
    """Text to token ids.

    eos:        id of the end-of-sequence token
    vocab_size: largest id + 1
    special:    ids of the special tokens by their spelling
    identity:   sha256 of the file, in hexadecimal digits
    backend:    what serves `encode_batch`, and why
    """

    def __init__(self, path: Path, library: Library, identity: str) -> None:
        self._path, self._library, self.identity = path, library, identity
        self.eos, self.vocab_size, self.special = library.eos, library.vocab_size, library.special
        self.backend = library.name
        self._fast: FastTokenizer | None = None

    def accelerate(self) -> None:
        """Let gigatoken serve `encode_batch`, if it gives the library's ids for a built-in sample."""
        sample = probes(self._library.special)
        try:
            fast = FastTokenizer(self._library)
            reason = fast.difference(sample)
        except Exception as error:  # a package written in another language raises what it likes
            reason = f"it cannot serve this tokenizer: {str(error)[:120]}"
        if reason is None:
            self._fast = fast
            self.backend = f"{fast_tokenizer.NAME}, whose ids for {len(sample)} texts are those of {self._library.name}"
        else:
            self.backend = self._without(reason)

    def checked(self, texts: Sequence[str]) -> "Tokenizer":
        """This tokenizer, or one without gigatoken where that gives other ids for the texts."""
        reason = self._fast and self._fast.difference(texts)
        if not reason:
            return self
        plain = Tokenizer(self._path, self._library, self.identity)
        plain.backend = self._without(reason)
        return plain

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone: no begin- or end-of-sequence token is added, and a special token that is spelled out
        in it stays ordinary text."""
        return self._library.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The same for each text, as int32 [tokens]; the way to encode much text."""
        if self._fast is not None:
            return self._fast.encode_batch(texts)
        return [np.array(self._library.encode(text), dtype=np.int32) for text in texts]

    def token(self, name: str) -> int:
        """Id of the special token of this spelling.

        Raises:
            DataError: the tokenizer has none of that name.
        """
        if name not in self.special:
            shown = ", ".join([*self.special][:_LISTED]) + (" ..." if len(self.special) > _LISTED else "")
            raise DataError(
                f"tokenizer {self._path} has no special token {name!r} (it has {shown}); add it to the tokenizer, or "
                "choose a template or format that does not write it"
            )
        return self.special[name]

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of ids; special tokens have none."""
        return self._library.decode(tokens)

    def _without(self, reason: str) -> str:
        return f"{self._library.name}, without {fast_tokenizer.NAME}: {reason}"


def load_tokenizer(path: str) -> Tokenizer:
    """The tokenizer in a file; the suffix tells its kind.

    Raises:
        DataError: no such file, an unknown suffix, a damaged file, or no end-of-sequence token.
    """
    file = Path(path)
    if not file.is_file():
        raise DataError(f"tokenizer {path}: no such file; give a sentencepiece .model or a tokenizer.json")
    libraries = {".model": SentencePieceModel, ".json": TokenizerJson}
    if file.suffix not in libraries:
        raise DataError(
            f"tokenizer {path}: the suffix {file.suffix!r} is neither .model (sentencepiece) nor .json (tokenizer.json)"
        )
    data = file.read_bytes()
    return Tokenizer(file, libraries[file.suffix](file, data), hashlib.sha256(data).hexdigest())
