"""Micro-batches and steps: the data structures that data, model and runtime share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from megavl.config.tiles import Grid, Tiling
from megavl.config.tokens import IGNORE_INDEX

Kind = Literal["text", "multimodal"]


@dataclass(frozen=True)
class ImagePlaces:
    """Indices of image features, newlines and separators into the tokens of a micro-batch, int64.

    features:   [tiles * tile_features], in the order of the tiles
    newlines:   [newlines]; [0] for a model without tiling
    separators: [separators]; [0] for a model without tiling
    """

    features: Tensor
    newlines: Tensor
    separators: Tensor


@dataclass(frozen=True)
class Batch:
    """One micro-batch: packs of documents laid end to end, `T` tokens in all. `Batch.of` builds it.

    Lengths, packs and grids are host values, so that no layer reads them from a device.

    tokens:     int64 [T]; an image is a run of placeholders, as many as its grid takes
    labels:     int64 [T]; the token that position t should predict, IGNORE_INDEX (`config.tokens`) where there is none
    positions:  int64 [T]; restart at 0 with every document
    cu_seqlens: int32 [N + 1]; document n is tokens[cu_seqlens[n]:cu_seqlens[n + 1]]; the last entry is T
    supervised: int64 [S], rising; the positions with a label. Position 0 stands alone where there are none, so that no
                kernel has an empty operand
    lengths:    tokens of each of the N documents, T in all
    packs:      how many; each has T / packs tokens
    grids:      of each image, in the order of the placeholders; DeepSeek-VL's have no local tile
    places:     indices of the images' features, newlines and separators into the tokens
    pixels:     uint8 [tiles, 3, S, S], RGB, S the side of `ModelConfig.pixel_tower`: the tiles of all images, of each
                the overview first. Where the tensor ranks share the tiles (`parallel.vision: sharded`), only those of
                `tile_share`. Of no tiles in a text step: the towers do not run. In a multimodal step a rank without
                tiles of its own has one blank tile, whose features are discarded: every rank then has the same
                gradients and runs the same collectives. None on ranks that do not hold the stem, and wherever tiles
                are encoded before the passes (`TilesAhead`)
    features:   [tiles, tile_features, D] on the device, where the tiles of the step were encoded before the passes; of
                no tiles if the micro-batch has none. None in a text step, on ranks that do not hold the stem, and in
                host memory
    """

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    supervised: Tensor
    lengths: tuple[int, ...]
    packs: int
    grids: tuple[Grid, ...]
    places: ImagePlaces
    pixels: Tensor | None
    features: Tensor | None = None

    @classmethod
    def of(
        cls,
        tiling: Tiling,
        tokens: Tensor,
        labels: Tensor,
        lengths: Sequence[int],
        packs: int,
        grids: Sequence[Grid] = (),
        pixels: Tensor | None = None,
    ) -> "Batch":
        """A micro-batch in host memory; positions, borders and image places are derived.

        Args:
            tiling: of the model
            tokens, labels: int64 [T]
            lengths: tokens of each document, T in all
            packs, grids, pixels: as in `Batch`

        Raises:
            ValueError: the number of placeholders among the tokens is not what the grids take.
        """
        documents = torch.tensor([0, *lengths])
        borders = documents.cumsum(0)  # [N + 1]
        return cls(
            tokens=tokens,
            labels=labels,
            positions=torch.arange(len(tokens)) - borders[:-1].repeat_interleave(documents[1:]),  # [T]
            cu_seqlens=borders.int(),
            supervised=_supervised(labels),
            lengths=tuple(lengths),
            packs=packs,
            grids=tuple(grids),
            places=ImagePlaces(*map(torch.from_numpy, tiling.places(tokens.numpy(), grids))),
            pixels=pixels,
        )

    @property
    def tiles(self) -> int:
        """Tiles of all images, wherever they are encoded."""
        return sum(grid.tiles for grid in self.grids)

    def to(self, device: torch.device) -> "Batch":
        """The same micro-batch on another device; copies from pinned memory do not wait."""
        return self.map_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The same micro-batch in page-locked memory, from which copies to a GPU do not wait. A DataLoader calls it, in
        a thread of its own."""
        return self.map_tensors(Tensor.pin_memory)

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Keep the memory of the tensors, once they are freed, until `stream` has done what it was given by then."""

        def record(tensor: Tensor) -> Tensor:
            tensor.record_stream(stream)
            return tensor

        self.map_tensors(record)

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """The same micro-batch with `change` applied to its tensors but `features`, which are made on the device."""
        return replace(
            self,
            tokens=change(self.tokens),
            labels=change(self.labels),
            positions=change(self.positions),
            cu_seqlens=change(self.cu_seqlens),
            supervised=change(self.supervised),
            places=ImagePlaces(*map(change, (self.places.features, self.places.newlines, self.places.separators))),
            pixels=None if self.pixels is None else change(self.pixels),
        )


def _supervised(labels: Tensor) -> Tensor:
    """See `Batch.supervised`."""
    (positions,) = (labels != IGNORE_INDEX).nonzero(as_tuple=True)  # [S]
    return positions if len(positions) else positions.new_zeros(1)


def tile_share(tiles: int, rank: int, size: int) -> range:
    """Which tiles of a micro-batch tensor rank `rank` of `size` decodes and encodes, where the ranks share them: equal
    runs, of which the last ones are shorter or empty."""
    each = -(-tiles // size)
    return range(min(rank * each, tiles), min((rank + 1) * each, tiles))


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
class TilesAhead:
    """The tiles of a step that this rank encodes before the passes (`parallel.vision: pipelined, balanced`).

    by_replica: tiles in the packs of each data-parallel rank
    pixels:     uint8 [tiles, 3, S, S] each: pieces of this rank's run of tiles, in order; none where it is empty
    """

    by_replica: tuple[int, ...]
    pixels: tuple[Tensor, ...]

    def pin_memory(self) -> "TilesAhead":
        """The same in page-locked memory."""
        return replace(self, pixels=tuple(piece.pin_memory() for piece in self.pixels))


@dataclass(frozen=True)
class StepBatch:
    """What one rank feeds into one optimizer step, with the facts of the whole global batch.

    supervised_tokens, tokens, images, tiles, squared_tokens count the global batch, not this rank's part.
    squared_tokens: sum over documents of their length squared, which packed attention costs.
    bad_images: those that this rank has replaced, not the global batch's.
    ahead: what this rank encodes before the passes; None where each micro-batch has its pixels.
    """

    step: int
    kind: Kind
    micro_batches: tuple[Batch, ...]
    supervised_tokens: int
    tokens: int
    images: int
    tiles: int
    squared_tokens: int
    bad_images: tuple[BadImage, ...] = ()
    ahead: TilesAhead | None = None

    @property
    def counts(self) -> dict[str, int]:
        """What the work of the step depends on: the arguments of `megavl.plan.cost.step_flops`."""
        names = ("tokens", "supervised_tokens", "squared_tokens", "tiles")
        return {name: getattr(self, name) for name in names}
