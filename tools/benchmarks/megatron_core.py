"""megatron-core's readers of an indexed dataset."""

from pathlib import Path

import numpy as np
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split


class _Tokenizer:
    """What GPTDataset asks of one."""

    eod, pad, vocab_size = 2, 3, 1 << 14
    unique_identifiers = {"name": "benchmark"}


def open_samples(prefix: Path, seq_len: int, samples: int, cache: Path) -> GPTDataset:
    """So many packs of tokens, whose order is kept in the cache directory."""
    dataset = IndexedDataset(str(prefix))
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=seq_len,
        blend=([str(prefix)], None),
        split="1",
        path_to_cache=str(cache),
        tokenizer=_Tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    documents = np.arange(len(dataset), dtype=np.int32)
    return GPTDataset(dataset, str(prefix), documents, samples, Split.train, config)


def read_documents(prefix: Path, places: list[int]) -> None:
    """All tokens of each document, as int64 for the model; here a document is one sequence."""
    dataset = IndexedDataset(str(prefix))
    for document in places:
        dataset[document].astype(np.int64)
