"""How each parameter is cut over the tensor axis.

One fact, attached to the parameter where it is made, and read by initialisation, checkpoints and the gradient norm.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from megavl.parallel.groups import Axis


@dataclass(frozen=True)
class Shard:
    """A parameter is slice `index` of `count` equal slices of the full tensor along `dim`."""

    dim: int = 0
    index: int = 0
    count: int = 1

    def full_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the full tensor of which a slice has `shape`."""
        return tuple(size * self.count if dim == self.dim else size for dim, size in enumerate(shape))

    def offsets(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """First index of the slice of `shape` in each dim of the full tensor."""
        return tuple(size * self.index if dim == self.dim else 0 for dim, size in enumerate(shape))

    def slice(self, full: Tensor) -> Tensor:
        """This shard of a full tensor, as a view."""
        return full.chunk(self.count, self.dim)[self.index] if self.count > 1 else full


WHOLE = Shard()


def mark(parameter: nn.Parameter, dim: int, axis: Axis) -> nn.Parameter:
    """Say that `parameter` is this rank's slice along `dim`."""
    parameter.shard = Shard(dim, axis.rank, axis.size)
    return parameter


def shard_of(parameter: nn.Parameter) -> Shard:
    """The mark of a parameter; one without is whole on every rank."""
    return getattr(parameter, "shard", WHOLE)
