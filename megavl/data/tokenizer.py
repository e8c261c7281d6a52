"""Tokenizers: sentencepiece models and HF `tokenizer.json` files behind one protocol."""

import hashlib
from pathlib import Path
from typing import Protocol

import sentencepiece
import tokenizers

from megavl.config.tokens import END_OF_SEQUENCE
from megavl.data.errors import DataError


class Tokenizer(Protocol):
    """Text to token ids.

    eos:        id of the end-of-sequence token
    vocab_size: largest id + 1
    identity:   sha256 of the file, in hexadecimal digits
    """

    eos: int
    vocab_size: int
    identity: str

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone: no begin- or end-of-sequence token is added."""
        ...

    def decode(self, tokens: list[int]) -> str:
        """Text of ids."""
        ...


class SentencePieceTokenizer:
    """A sentencepiece `.model` file."""

    def __init__(self, path: Path) -> None:
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise DataError(
                f"tokenizer {path} is not a sentencepiece model ({error}); give a .model file or a tokenizer.json"
            ) from error
        self.eos = self._model.eos_id()
        if self.eos < 0:
            raise DataError(
                f"tokenizer {path} has no end-of-sequence token, which every document must end with; "
                "train the model with an eos_id"
            )
        self.vocab_size = self._model.get_piece_size()
        self.identity = file_identity(path)

    def encode(self, text: str) -> list[int]:
        """Ids of the text."""
        return self._model.encode(text)

    def decode(self, tokens: list[int]) -> str:
        """Text of ids."""
        return self._model.decode(tokens)


class JsonTokenizer:
    """A `tokenizer.json` file of the `tokenizers` package."""

    def __init__(self, path: Path) -> None:
        try:
            self._model = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises bare Exception
            raise DataError(
                f"tokenizer {path} is not a tokenizer.json ({error}); give a .model file or a tokenizer.json"
            ) from error
        # A document is data: a special token that is spelled out in it stays text.
        self._model.encode_special_tokens = True
        # tokenizer.json does not say which of its special tokens ends a sequence.
        special = {token.content: id for id, token in self._model.get_added_tokens_decoder().items() if token.special}
        eos = next((special[name] for name in END_OF_SEQUENCE if name in special), None)
        if eos is None:
            raise DataError(
                f"tokenizer {path} has no end-of-sequence token: none of {', '.join(END_OF_SEQUENCE)} is among its "
                f"special tokens ({', '.join(special) or 'it has none'}); add one as a special token"
            )
        self.eos = eos
        self.vocab_size = max(self._model.get_vocab().values()) + 1
        self.identity = file_identity(path)

    def encode(self, text: str) -> list[int]:
        """Ids of the text."""
        return self._model.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: list[int]) -> str:
        """Text of ids."""
        return self._model.decode(tokens)


def load_tokenizer(path: str) -> Tokenizer:
    """The tokenizer in a file; the suffix tells its kind.

    Raises:
        DataError: no such file, an unknown suffix, a damaged file, or no end-of-sequence token.
    """
    file = Path(path)
    if not file.is_file():
        raise DataError(f"tokenizer {path}: no such file; give a sentencepiece .model or a tokenizer.json")
    match file.suffix:
        case ".model":
            return SentencePieceTokenizer(file)
        case ".json":
            return JsonTokenizer(file)
    raise DataError(
        f"tokenizer {path}: the suffix {file.suffix!r} is neither .model (sentencepiece) nor .json (tokenizer.json)"
    )


def file_identity(path: Path) -> str:
    """sha256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
