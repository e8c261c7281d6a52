"""Collectives and point-to-point messages, and the bytes that a rank sends for each."""

from dataclasses import dataclass
from typing import Literal

Axis = Literal["tensor", "expert", "pipeline", "data"]
Kind = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send"]


@dataclass(frozen=True)
class Message:
    """A collective of `ranks` ranks, or a message to one of them.

    bytes: all_reduce: of the tensor, which has one shape on all ranks; all_gather: of the whole result; reduce_scatter:
           of the whole input; all_to_all: of a rank's input, its own part included; send: of the tensor
    """

    axis: Axis
    kind: Kind
    bytes: int
    ranks: int

    @property
    def sent(self) -> float:
        """Bytes that one rank sends, by the ring algorithms. A reduce-scatter and an all-gather each send all parts but
        one, and an all-reduce is both. An all-to-all sends all parts but the rank's own."""
        if self.kind == "send":
            return self.bytes
        passes = 2 if self.kind == "all_reduce" else 1
        return passes * (self.ranks - 1) / self.ranks * self.bytes
