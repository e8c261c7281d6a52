"""SwiGLU feed-forward layers of all experts at once, each on its own rows.

Every implementation has one signature, `ExpertMlp`:
    x:        [N, D], sorted by expert; N is at least 1
    gate, up: [E, F, D]
    down:     [E, D, F]
    groups:   how many rows each expert has, N in all
    returns [N, D]; the gradients of an expert without rows are zeros
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from megavl.ops.grouped import GroupedLinear, Groups

ExpertMlp = Callable[[Tensor, Tensor, Tensor, Tensor, Groups], Tensor]


@dataclass(frozen=True)
class ComposedExpertMlp:
    """Three grouped products with the activation between them: an `ExpertMlp`."""

    grouped_linear: GroupedLinear
    swiglu: Callable[[Tensor, Tensor], Tensor]

    def __call__(self, x: Tensor, gate: Tensor, up: Tensor, down: Tensor, groups: Groups) -> Tensor:
        hidden = self.swiglu(self.grouped_linear(x, gate, groups), self.grouped_linear(x, up, groups))  # [N, F]
        return self.grouped_linear(hidden, down, groups)  # [N, D]
