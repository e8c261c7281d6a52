"""HF `tokenizer.json` files."""

import json
from pathlib import Path

import gigatoken
import tokenizers

from megavl.config.tokens import END_OF_SEQUENCE
from megavl.data.errors import DataError
from megavl.data.tokenizer_library import is_special


class TokenizerJson:
    """A tokenizer of the `tokenizers` package. Added tokens that it calls special or that are spelled `<...>` are its
    special tokens."""

    name = f"tokenizers {tokenizers.__version__}"

    def __init__(self, path: Path, data: bytes) -> None:
        """Raises DataError where the bytes are no tokenizer, or one without an end-of-sequence token."""
        try:
            self._spec = json.loads(data)
            added = self._spec["added_tokens"]
            for token in added:
                token["special"] = is_special(token["content"], token["special"])
            self._model = tokenizers.Tokenizer.from_str(json.dumps(self._spec))
        except Exception as error:  # the package raises bare Exception
            raise DataError(
                f"tokenizer {path} is not a tokenizer.json ({error}); give a .model file or a tokenizer.json"
            ) from error
        # A document is data: a special token that is spelled out in it stays text.
        self._model.encode_special_tokens = True
        self.special = {
            token["content"]: self._model.token_to_id(token["content"]) for token in added if token["special"]
        }
        # tokenizer.json does not say which of its special tokens ends a sequence.
        eos = next((self.special[name] for name in END_OF_SEQUENCE if name in self.special), None)
        if eos is None:
            raise DataError(
                f"tokenizer {path} has no end-of-sequence token: none of {', '.join(END_OF_SEQUENCE)} is among its "
                f"special tokens ({', '.join(self.special) or 'it has none'}); add one as a special token"
            )
        self.eos = eos
        self.vocab_size = max(self._model.get_vocab().values()) + 1

    def encode(self, text: str) -> list[int]:
        """Ids of the text."""
        return self._model.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: list[int]) -> str:
        """Text of ids."""
        return self._model.decode(tokens)

    def load_fast(self) -> gigatoken.Tokenizer:
        """gigatoken, which finds special tokens in any text unless it is not told of them."""
        ordinary = [token for token in self._spec["added_tokens"] if not token["special"]]
        return gigatoken.Tokenizer.from_json(json.dumps(self._spec | {"added_tokens": ordinary}))
