"""What a library must offer to be the tokenizer of datasets."""

from typing import Protocol

import gigatoken


class Library(Protocol):
    """One tokenizer file, opened by the package of its format: what defines the ids.

    name:       the package and its version
    eos:        id of the end-of-sequence token
    vocab_size: largest id + 1
    special:    ids of the special tokens by their spelling
    """

    name: str
    eos: int
    vocab_size: int
    special: dict[str, int]

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone. A special token that is spelled out in it stays ordinary text."""
        ...

    def decode(self, tokens: list[int]) -> str:
        """Text of ids."""
        ...

    def load_fast(self) -> gigatoken.Tokenizer:
        """gigatoken with what `encode` knows. Raises whatever gigatoken raises for a tokenizer that it cannot serve."""
        ...


def is_special(spelling: str, declared: bool) -> bool:
    """Whether a token beside the learned vocabulary is special: only a template or a format writes it, never a text.

    Files declare most of them (control pieces, `"special": true`), but not all: DeepSeek's `<｜User｜>` is an ordinary
    added token, and so are letters such as `ü` and runs of spaces, which text must go on using. So what is not declared
    is special where it is spelled `<...>`.
    """
    return declared or (len(spelling) > 2 and spelling.startswith("<") and spelling.endswith(">"))
