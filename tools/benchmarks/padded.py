"""Padded micro-batches: the documents of a step as users of transformers batch them."""

import random
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megavl.batch import Batch, StepBatch
from megavl.config.tokens import IGNORE_INDEX


def documents_of(batch: StepBatch) -> list[Tensor]:
    """Tokens int64 [length] of each document of a text step, without the padding of its packs: a document without a
    supervised token."""
    return [
        tokens
        for pack in batch.micro_batches
        for tokens, labels in zip(pack.tokens.split(pack.lengths), pack.labels.split(pack.lengths), strict=True)
        if (labels != IGNORE_INDEX).any()
    ]


def padded_batches(documents: Sequence[Tensor], size: int, by_length: bool, seed: int) -> list[dict[str, Tensor]]:
    """Micro-batches of `size` documents, the last of what is left, each padded to its longest document.

    Args:
        documents: int64 [length] each
        by_length: sort the documents by length first; else their order is random
        seed: of the order
    """
    order = sorted(documents, key=len) if by_length else random.Random(seed).sample(documents, len(documents))
    return [_padded(order[first : first + size]) for first in range(0, len(order), size)]


def _padded(documents: Sequence[Tensor]) -> dict[str, Tensor]:
    longest = max(map(len, documents))
    ids = torch.zeros(len(documents), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, document in enumerate(documents):
        ids[row, : len(document)], mask[row, : len(document)] = document, 1
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, IGNORE_INDEX)}


def padding_share(batches: Sequence[dict[str, Tensor]]) -> float:
    """Share of the positions of some micro-batches that are padding."""
    masks = [batch["attention_mask"] for batch in batches]
    return 1 - sum(mask.sum().item() for mask in masks) / sum(mask.numel() for mask in masks)


def without_targets_beyond(pack: Batch) -> Batch:
    """The pack, whose documents do not supervise their last position. The last position of a document that was cut
    predicts the token beyond the cut, which no batch of separate documents has."""
    last = pack.cu_seqlens[1:].long() - 1  # [N]
    return replace(pack, labels=pack.labels.index_fill(0, last, IGNORE_INDEX))
