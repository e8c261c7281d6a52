"""Batch: the one noun that crosses rooms."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["text", "multimodal"]


@dataclass(frozen=True)
class Batch:
    """One micro-batch: packs of documents laid end to end, `T` tokens in all.

    tokens:     int64 [T]; an image is a run of `image_tokens` placeholders
    labels:     int64 [T]; the token that position t should predict, -100 where nothing is supervised
    positions:  int64 [T]; restart at 0 with every document
    cu_seqlens: int32 [N + 1]; document n is tokens[cu_seqlens[n]:cu_seqlens[n + 1]]; the last entry is T
    pixels:     tower name ("siglip", "sam") -> float32 [I, 3, S, S], normalised, in the order of the placeholders;
                I may be 0. None on ranks that do not hold the stem. Where the tensor ranks share the images
                (`parallel.vision: sharded`), only those of `image_share`
    """

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    pixels: Mapping[str, Tensor] | None

    def to(self, device: torch.device) -> "Batch":
        """The same micro-batch on another device; copies from pinned memory do not wait."""
        return Batch(
            *(
                tensor.to(device, non_blocking=True)
                for tensor in (self.tokens, self.labels, self.positions, self.cu_seqlens)
            ),
            self.pixels and {tower: pixels.to(device, non_blocking=True) for tower, pixels in self.pixels.items()},
        )

    def pin_memory(self) -> "Batch":
        """The same micro-batch in page-locked memory, from which copies to a GPU do not wait. A DataLoader calls it, in
        a thread of its own."""
        return Batch(
            *(tensor.pin_memory() for tensor in (self.tokens, self.labels, self.positions, self.cu_seqlens)),
            self.pixels and {tower: pixels.pin_memory() for tower, pixels in self.pixels.items()},
        )


def image_share(images: int, rank: int, size: int) -> range:
    """Which images of a micro-batch tensor rank `rank` of `size` decodes and encodes, where the ranks share them: equal
    runs, of which the last ones are shorter or empty."""
    each = -(-images // size)
    return range(min(rank * each, images), min((rank + 1) * each, images))


@dataclass(frozen=True)
class BadImage:
    """An image that could not be decoded, for which a blank one stands in.

    pack, image:     where it was met: number of the pack in the global batch, of the image in the pack
    dataset, document, sequence: where it is stored: prefix, key of the document, sequence of the dataset
    reason:          why it could not be decoded
    """

    pack: int
    image: int
    dataset: str
    document: str
    sequence: int
    reason: str


@dataclass(frozen=True)
class StepBatch:
    """What one rank feeds into one optimizer step, with the facts of the whole global batch.

    supervised_tokens, tokens, images, squared_tokens count the global batch, not this rank's part.
    squared_tokens: sum over documents of their length squared, which packed attention costs.
    bad_images: those that this rank has replaced, not the global batch's.
    """

    step: int
    kind: Kind
    micro_batches: tuple[Batch, ...]
    supervised_tokens: int
    tokens: int
    images: int
    squared_tokens: int
    bad_images: tuple[BadImage, ...] = ()
