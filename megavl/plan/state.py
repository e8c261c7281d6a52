"""Bytes that weights, gradients and optimizer state take on a rank, under DeepSpeed's partitioning.

Source of the stages: ZeRO (arXiv 1910.02054) section 5; gradients are accumulated in fp32 (DeepSeek-LLM section 2.4).
"""

from dataclasses import dataclass
from math import ceil

from megavl.config.run import RunConfig
from megavl.plan.cost import Count


@dataclass(frozen=True)
class StateBytes:
    """What a rank holds for as long as the run lasts; activations come on top."""

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


def state_bytes(config: RunConfig, parameters: Count, dp: int) -> StateBytes:
    """State of a rank that holds `parameters` (those of all its stages, on its tensor rank).

    Weights have the size of the run's precision, gradients are fp32. Adam keeps two fp32 moments and, wherever weights
    are partitioned or bf16, an fp32 master of each trainable parameter. ZeRO-1 partitions the optimizer's part over the
    `dp` data-parallel ranks, ZeRO-2 the gradients too, ZeRO-3 also the weights. Of a routed expert there are fewer
    replicas, dp / `parallel.expert`, over which its state is partitioned.
    """
    zero, replicas = config.zero_stage(dp), dp // config.parallel.expert
    optimizer_bytes = 8 if zero == 0 else 12

    def shared(element_bytes: int, elements: int, from_stage: int) -> int:
        if zero < from_stage:
            return element_bytes * elements
        others = elements - parameters.experts
        return ceil(element_bytes * others / dp) + ceil(element_bytes * parameters.experts / replicas)

    return StateBytes(
        weights=shared(config.train.element_bytes, parameters.total, 3),
        gradients=shared(4, parameters.trainable, 2),
        optimizer=shared(optimizer_bytes, parameters.trainable, 1),
    )
