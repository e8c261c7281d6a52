"""gigatoken in the place of a tokenizer's own package, for as long as it gives the same ids."""

from collections.abc import Sequence
from importlib.metadata import version

import numpy as np

from megavl.data.tokenizer_library import Library

NAME = f"gigatoken {version('gigatoken')}"
# Characters after which a tokenizer is loaded anew: it keeps every word that it has met, without a bound (measured: ten
# bytes for each byte of words never seen before). Loading takes a few tenths of a second.
_RELOAD_CHARACTERS = 1 << 29


class FastTokenizer:
    """Encodes on the calling thread. Work is spread over processes; threads beside them would take turns on the same
    cores."""

    def __init__(self, library: Library) -> None:
        """Raises whatever gigatoken raises for a tokenizer that it cannot serve."""
        self._library = library
        self._load()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text: int32 [tokens]."""
        if self._left < 0:
            self._load()
        self._left -= sum(map(len, texts))
        # One by one: gigatoken's own batches of a sentencepiece model begin without the words met before.
        return [self._tokenizer.encode(text).view(np.int32) for text in texts]

    def difference(self, texts: Sequence[str]) -> str | None:
        """The first place where the ids are not those of the library, in words; None where there is none."""
        for text, tokens in zip(texts, self.encode_batch(texts), strict=True):
            fast, plain = tokens.tolist(), self._library.encode(text)
            if fast != plain:
                same = (number for number, pair in enumerate(zip(fast, plain, strict=False)) if pair[0] != pair[1])
                place = next(same, min(len(fast), len(plain)))
                return (
                    f"{text[:40]!r} has the ids {fast[place : place + 4]} from place {place} on in the place of "
                    f"{plain[place : place + 4]}"
                )
        return None

    def _load(self) -> None:
        self._tokenizer, self._left = self._library.load_fast(), _RELOAD_CHARACTERS
