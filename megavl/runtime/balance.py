"""How busy the routed experts of a run are, and what keeps them equally so."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megavl.config.run import RunConfig
from megavl.parallel.groups import Mesh


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


class Balance:
    """The routers of this rank's stages, balanced as `config.balance` says.

    Biases move once a step, by what the whole global batch has chosen (arXiv 2408.15664, algorithm 1). The auxiliary
    loss is only in the gradient: the routers add it, with the scale that `build_stages` gives them.
    """

    def __init__(self, stages: nn.ModuleList, config: RunConfig, mesh: Mesh):
        decoder = config.model.decoder
        self._layers = tuple(layer for layer in range(decoder.layers) if decoder.has_experts(layer))
        self._experts = decoder.moe.experts if self._layers else 0
        self._biased = bool(self._layers) and decoder.moe.router == "sigmoid"
        self._bias_step, self._packs, self._mesh = config.balance.bias_step, config.train.global_batch, mesh
        self._device = next(stages.parameters()).device
        self._routers = {index: router for stage in stages for index, router in stage.vlm.routers.items()}

    def step(self) -> Load | None:
        """After the backward passes of a step: move the biases, and reset the counters. Collective over the world;
        every rank has the load of all layers, None where the model has no experts."""
        if not self._layers:
            return None
        tokens, biases, auxiliary = self._over_the_world()
        if self._biased:
            # sign(mean load - load), in whole numbers.
            biases += self._bias_step * (tokens.sum(1, keepdim=True) - self._experts * tokens).sign()  # [layers, E]
            for bias, layer in zip(biases, self._layers, strict=True):
                if layer in self._routers:
                    self._routers[layer].bias.copy_(bias)
        for router in self._routers.values():
            router.load.zero_()
            router.auxiliary.zero_()
        return Load(
            self._layers,
            tokens.cpu(),
            auxiliary.cpu() / self._packs,
            biases.cpu() if self._biased else None,
        )

    def _over_the_world(self) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens int64 [layers, E], biases float32 [layers, E] and summed auxiliary losses float64 [layers] of the
        whole model, from what the ranks have of them."""
        dp, tp, experts = self._mesh.dp, self._mesh.tp, self._experts
        # In one message: whole numbers and fp32 are exact in fp64.
        table = torch.zeros(len(self._layers), 2 * experts + 1, dtype=torch.float64, device=self._device)
        tokens, biases, auxiliary = table.split([experts, experts, 1], dim=1)
        for row, layer in enumerate(self._layers):
            router = self._routers.get(layer)
            if router is None:
                continue
            if tp.sequence or tp.rank == 0:  # else all tensor ranks have routed the same tokens
                tokens[row] = router.load
            if tp.rank == 0:
                auxiliary[row] = router.auxiliary
            if self._biased and dp.rank == tp.rank == 0:
                biases[row] = router.bias
        dist.all_reduce(table)
        return tokens.long(), biases.float(), auxiliary.squeeze(1)
