"""How each parameter is cut over the tensor axis and the expert axis.

One fact, attached to the parameter where it is made, and read by initialisation, checkpoints and the gradient norm.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from megavl.parallel.groups import Axis

AxisName = Literal["tp", "ep"]


@dataclass(frozen=True)
class Cut:
    """Slice `index` of `count` equal slices along `dim`, one on each rank of an axis."""

    axis: AxisName
    dim: int
    index: int
    count: int


@dataclass(frozen=True)
class Shard:
    """What a rank has of a parameter: of the full tensor the box that its cuts, each along another dim, leave."""

    cuts: tuple[Cut, ...] = ()

    def over(self, axis: AxisName) -> bool:
        """Whether ranks of an axis hold different parts; with an axis of size 1 too, which makes no difference."""
        return any(cut.axis == axis for cut in self.cuts)

    def full_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the full tensor of which a box has `shape`."""
        full = list(shape)
        for cut in self.cuts:
            full[cut.dim] *= cut.count
        return tuple(full)

    def offsets(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """First index of the box of `shape` in each dim of the full tensor."""
        first = [0] * len(shape)
        for cut in self.cuts:
            first[cut.dim] = shape[cut.dim] * cut.index
        return tuple(first)

    def slice(self, full: Tensor) -> Tensor:
        """This box of a full tensor, as a view."""
        for cut in self.cuts:
            full = full.chunk(cut.count, cut.dim)[cut.index]
        return full


WHOLE = Shard()


def mark(parameter: nn.Parameter, dim: int, axis: Axis, name: AxisName = "tp") -> nn.Parameter:
    """Record that dim `dim` of `parameter` is sharded over axis `name`."""
    parameter.shard = Shard((*shard_of(parameter).cuts, Cut(name, dim, axis.rank, axis.size)))
    return parameter


def shard_of(parameter: nn.Parameter) -> Shard:
    """The mark of a parameter; one without is whole on every rank."""
    return getattr(parameter, "shard", WHOLE)
