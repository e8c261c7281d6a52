"""Layout of a micro-batch for the decoder blocks: packs, borders of the documents, rotary tables."""

from dataclasses import dataclass

from torch import Tensor

from megavl.batch import Batch
from megavl.config.model import DecoderConfig
from megavl.ops.rope import rotary_tables


@dataclass(frozen=True)
class PackLayout:
    """What a decoder block needs of a micro-batch of T tokens besides their hidden states. The same for all blocks.

    cu_seqlens: int32 [N + 1]; document n is rows cu_seqlens[n]:cu_seqlens[n + 1]; the last entry is T
    lengths:    tokens of each of the N documents, on the host
    packs:      how many; each has T / packs tokens
    cos, sin:   float32 [T, 1, r / 2], of the r channels of a head that have a position
    """

    cu_seqlens: Tensor
    lengths: tuple[int, ...]
    packs: int
    cos: Tensor
    sin: Tensor

    @classmethod
    def of(cls, batch: Batch, config: DecoderConfig) -> "PackLayout":
        """The layout of a micro-batch, on its device."""
        width = config.head_width if config.mla is None else config.mla.rope_width
        cos, sin = rotary_tables(batch.positions, width, config.rope_theta)
        return cls(batch.cu_seqlens, batch.lengths, batch.packs, cos, sin)
