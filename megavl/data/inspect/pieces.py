"""Pieces: the characters that each token of a text stands for."""

from collections.abc import Sequence

from megavl.data.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
# A character has at most so many bytes, so a replacement character behind more tokens is the text's own.
_CHARACTER_BYTES = 4


def pieces(tokens: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """The text of every token; all together they are the text. A special token has none.

    Decoded one at a time, tokens would lose the blanks before words and break characters that take several tokens. So
    each is decoded behind the token before it, and what that adds is its own. A character that several tokens spell
    together belongs to the last of them; the others are empty.
    """
    special = set(tokenizer.special.values())
    result = [""] * len(tokens)
    start = done = 0
    for index, token in enumerate(tokens):
        if token in special:
            start = done = index + 1
            continue
        before = tokenizer.decode(list(tokens[start:done]))
        text = tokenizer.decode(list(tokens[start : index + 1]))
        is_last = index + 1 == len(tokens) or tokens[index + 1] in special
        if text.endswith(_REPLACEMENT) and index - done + 1 < _CHARACTER_BYTES and not is_last:
            continue
        result[index] = text[len(before) :]
        start, done = done, index + 1
    return result
