"""What the files of a dataset have in common: their names, the modes of sequences and the elements of the .bin.

Source: `IndexedDatasetBuilder` and `IndexedDataset` of megatron-core 0.16.1, which open what is written here.
docs/data.md has the layout.
"""

import os
from typing import NamedTuple

import numpy as np

from megavl.config.files import DATASET_SUFFIXES
from megavl.data.errors import DataError

# Modes of a sequence. 0 and 1 are Megatron's; text that is read but not learned (a user's turn) is 2.
TEXT, IMAGE, PROMPT = 0, 1, 2


class Paths(NamedTuple):
    """The files of a dataset: Megatron's two, and the sidecar with what they have no place for."""

    bin: str
    idx: str
    meta: str


def dataset_paths(prefix: str) -> Paths:
    """Files of the dataset with this prefix.

    Raises:
        DataError: the prefix ends without a name.
    """
    if not os.path.basename(prefix):
        raise DataError(
            f"the prefix {prefix!r} ends without a name, so that its files would be hidden ones called .bin, .idx and "
            f".meta; add a name, for example {prefix}corpus"
        )
    return Paths(**{suffix.removeprefix("."): prefix + suffix for suffix in DATASET_SUFFIXES})


def token_dtype(vocab_size: int, multimodal: bool) -> np.dtype:
    """Elements of the .bin file, by megatron-core's rule for text; modes other than TEXT need int32."""
    return np.dtype("<u2" if vocab_size < 65500 and not multimodal else "<i4")
