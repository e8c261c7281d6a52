"""How busy the routed experts of a run are."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Load:
    """What the routers of the whole model did in one step, with the whole global batch, on the CPU.

    layers:    index of each block with experts
    tokens:    int64 [layers, E], those that went to each expert
    auxiliary: float64 [layers], auxiliary loss, mean over the packs
    bias:      float32 [layers, E] as the next step will have it; None where routers have none
    """

    layers: tuple[int, ...]
    tokens: Tensor
    auxiliary: Tensor
    bias: Tensor | None

    @property
    def relative(self) -> Tensor:
        """Load of each expert over the mean of its layer: float64 [layers, E]."""
        return self.tokens / self.tokens.double().mean(1, keepdim=True)  # [layers, 1]

    @property
    def max_over_mean(self) -> Tensor:
        """Of each layer, float64 [layers]: 1 where all experts are equally busy, E / `per_token` where every
        token goes to the same ones."""
        return self.relative.amax(1)

    @property
    def entropy(self) -> Tensor:
        """Of each layer's distribution over its experts, as a share of the largest there is: float64 [layers]."""
        share = self.tokens / self.tokens.sum(1, keepdim=True).double()  # [layers, E]
        return torch.special.entr(share).sum(1) / torch.tensor(share.shape[1]).double().log()
