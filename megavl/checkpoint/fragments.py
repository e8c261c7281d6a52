"""Named pieces of full tensors: what one rank holds of the run's state.

Tensor parallelism leaves a rank with a box of the full tensor, ZeRO with a flat range of that box. A flat range is
cut into boxes of the full tensor, which is the language of torch.distributed.checkpoint (DCP); so what is written
knows nothing of the topology that wrote it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

Kind = Literal["param", "master", "exp_avg", "exp_avg_sq"]
Indices = tuple[int, ...]


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + len(values)) in row-major order of the box of `shape` at `offsets` of a full tensor.

    name:       single-process name of the parameter, e.g. "blocks.3.attn.q_proj.weight"
    kind:       which of the parameter's tensors: the one the forward uses, its fp32 master, or an Adam moment
    full_shape: shape of the tensor of the whole model
    offsets:    first index of this rank's box in each dim of the full tensor
    shape:      shape of this rank's box
    start:      first element of the box that `values` holds
    values:     [n] of any dtype on any device, a view of the run's own memory: written from, and read into in place

    Raises:
        ValueError: the box does not fit the full tensor, or the range the box.
    """

    name: str
    kind: Kind
    full_shape: Indices
    offsets: Indices
    shape: Indices
    start: int
    values: Tensor

    def __post_init__(self):
        if self.kind not in get_args(Kind):
            raise ValueError(f"fragment of {self.name}: kind {self.kind!r} is none of {', '.join(get_args(Kind))}")
        fits = len(self.full_shape) == len(self.offsets) == len(self.shape) and all(
            0 <= offset <= offset + size <= full
            for offset, size, full in zip(self.offsets, self.shape, self.full_shape, strict=True)
        )
        if not fits:
            raise ValueError(
                f"fragment {self.key}: a box of {self.shape} at {self.offsets} is not inside {self.full_shape}"
            )
        if self.values.dim() != 1 or not 0 <= self.start <= self.start + len(self.values) <= prod(self.shape):
            raise ValueError(
                f"fragment {self.key}: values of shape {tuple(self.values.shape)} from element {self.start} on are not "
                f"a flat range of a box of {self.shape}, which has {prod(self.shape)} elements"
            )

    @classmethod
    def whole(cls, name: str, kind: Kind, full_shape: Indices, offsets: Indices, box: Tensor) -> "Fragment":
        """All of a box that the rank holds as a contiguous tensor."""
        values = box.detach().view(-1)  # [n]
        return cls(name, kind, tuple(full_shape), tuple(offsets), tuple(box.shape), 0, values)

    @property
    def key(self) -> str:
        """Name of the full tensor in the checkpoint."""
        return f"{self.kind}.{self.name}"

    def boxes(self) -> list[tuple[Indices, Tensor]]:
        """(offsets in the full tensor, view of `values` with the shape of the box), without empty boxes."""
        found, used = [], 0
        for inner, shape in flat_boxes(self.shape, self.start, self.start + len(self.values)):
            offsets = tuple(offset + index for offset, index in zip(self.offsets, inner, strict=True))
            box = self.values[used : used + prod(shape)].view(shape)  # shape
            found.append((offsets, box))
            used += prod(shape)
        return found


def flat_boxes(shape: Indices, start: int, stop: int) -> list[tuple[Indices, Indices]]:
    """Cut the row-major range [start, stop) of a tensor of `shape` into boxes, in the order of the range.

    Returns (offsets, sizes) of at most 2 * dims - 1 boxes, each one contiguous piece of the range: the rest of a begun
    row, whole rows, and the start of a last row, where the first and the last are cut likewise one dim further in.
    """
    if start >= stop:
        return []
    if not shape:
        return [((), ())]
    row = prod(shape[1:])
    (first, head), (last, tail) = divmod(start, row), divmod(stop, row)
    if first == last:
        return _in_row(first, flat_boxes(shape[1:], head, tail))
    boxes = []
    if head:
        boxes += _in_row(first, flat_boxes(shape[1:], head, row))
        first += 1
    if first < last:
        boxes.append(((first, *(0 for _ in shape[1:])), (last - first, *shape[1:])))
    return boxes + _in_row(last, flat_boxes(shape[1:], 0, tail))


def _in_row(index: int, boxes: list[tuple[Indices, Indices]]) -> list[tuple[Indices, Indices]]:
    """Boxes of one row as boxes of the tensor."""
    return [((index, *offsets), (1, *sizes)) for offsets, sizes in boxes]


class Boxes:
    """All that this rank holds of one full tensor, in the terms of DCP, whose planners call the three hooks below."""

    def __init__(self, full_shape: Indices, dtype: torch.dtype):
        self.full_shape = torch.Size(full_shape)
        self.dtype = dtype
        self.tensors: dict[torch.Size, Tensor] = {}  # offsets -> box

    @classmethod
    def of(cls, full: Tensor) -> "Boxes":
        """A full tensor as its own one box."""
        boxes = cls(tuple(full.shape), full.dtype)
        boxes.tensors[torch.Size([0] * full.dim())] = full
        return boxes

    def add(self, fragment: Fragment) -> None:
        """Take the boxes of another fragment of the same full tensor."""
        if self.full_shape != fragment.full_shape or self.dtype != fragment.values.dtype:
            raise ValueError(
                f"fragments of {fragment.key} disagree: {tuple(self.full_shape)} {self.dtype} and "
                f"{fragment.full_shape} {fragment.values.dtype}"
            )
        for offsets, box in fragment.boxes():
            if torch.Size(offsets) in self.tensors:
                raise ValueError(f"two fragments of {fragment.key} on this rank both start at {offsets}")
            self.tensors[torch.Size(offsets)] = box

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(offsets, box.shape) for offsets, box in self.tensors.items()]

    def __create_write_items__(self, key: str, _: object) -> list[WriteItem]:
        properties = TensorProperties(self.dtype)
        return [
            WriteItem(
                index=MetadataIndex(key, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.full_shape),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return self.tensors[index.offset]


def by_key(fragments: Iterable[Fragment]) -> dict[str, Boxes]:
    """The boxes of each full tensor of which this rank holds something."""
    boxes: dict[str, Boxes] = {}
    for fragment in fragments:
        boxes.setdefault(fragment.key, Boxes(fragment.full_shape, fragment.values.dtype)).add(fragment)
    return boxes
