"""Dataflow of a model: its parameters and weightless products, in the order in which activations meet them.

A flow is one of

- a `Parameter`: activations are multiplied with it, scaled with it, or it is added or looked up;
- `Attention` or a `BalanceLoss`: products of activations with each other;
- a tuple of flows: each takes the output of the one before it;
- a `Block`: a tuple of flows that may be recomputed as a whole;
- `Branches`: flows that take the same input and whose outputs are joined.

Residual connections are not shown: whatever reaches the end of a branch also reaches the sum with its input.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Literal, TypeAlias

from megavl.config.run import ParallelConfig


@dataclass(frozen=True)
class Product:
    """Matrix product of activations with a parameter; a convolution is one too.

    rows:  rows of activations for each token, each label (a token that is supervised) or each tile
    per:   what `rows` is counted for
    d_in:  channels of a row; of a convolution, channels times positions of its kernel
    d_out: channels of a row of the result
    """

    rows: int
    per: Literal["token", "label", "tile"]
    d_in: int
    d_out: int


@dataclass(frozen=True)
class Parameter:
    """One parameter at its full shape; `item` is its place in the model list.

    tensor_dim: the dim that is cut over the tensor axis, None where it is whole on every rank; that of routed experts
                is cut only where the run says so (`parallel.expert_width`)
    expert_dim: the dim that is cut over the expert axis, None where the parameter is not one of routed experts
    trained:    whether an optimizer may change it; the bias of a router is moved by its own rule
    product:    the product of activations with it; None where it is added, scaled with or looked up
    """

    name: str
    shape: tuple[int, ...]
    item: int
    tensor_dim: int | None = None
    expert_dim: int | None = None
    trained: bool = True
    product: Product | None = None

    @property
    def size(self) -> int:
        """Elements of the full parameter."""
        return prod(self.shape)

    def local_size(self, parallel: ParallelConfig) -> int:
        """Elements on one rank that holds its item."""
        size = self.size
        if self.tensor_dim is not None and (self.expert_dim is None or parallel.expert_width == "cut"):
            size //= parallel.tensor
        return size if self.expert_dim is None else size // parallel.expert


@dataclass(frozen=True)
class Attention:
    """Products of queries with keys, and of their scores with values.

    key_width:      channels of a key, all heads together
    value_width:    channels of a value, all heads together
    pairs_per_tile: pairs of query and key; None where each token sees those before it in its document
    positions:      tables of relative positions, whose products with the queries are added to the scores
    """

    key_width: int
    value_width: int
    pairs_per_tile: int | None = None
    positions: tuple[Parameter, ...] = ()


@dataclass(frozen=True)
class BalanceLoss:
    """Auxiliary loss of a router over `experts` experts."""

    experts: int


@dataclass(frozen=True)
class Branches:
    """Flows that take the same input and whose outputs are joined."""

    flows: tuple["Flow", ...]


@dataclass(frozen=True)
class Block:
    """A block of the decoder or of a tower; each flow takes the output of the one before it."""

    part: Literal["decoder", "tower"]
    flows: tuple["Flow", ...]


Flow: TypeAlias = Parameter | Attention | BalanceLoss | Branches | Block | tuple["Flow", ...]


def parameters_of(flow: Flow) -> Iterator[Parameter]:
    """The parameters of a flow in its order; one that several branches share comes once for each."""
    match flow:
        case Parameter():
            yield flow
        case Attention(positions=flows) | Branches(flows) | Block(flows=flows) | tuple(flows):
            for part in flows:
                yield from parameters_of(part)
