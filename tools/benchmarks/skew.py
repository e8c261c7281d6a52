"""Skewed routing: experts chosen with the probabilities of a Zipf distribution, whatever the router's scores are."""

import torch
from torch import Tensor

from megavl.config.model import MoeConfig
from megavl.model.moe import Router
from megavl.runtime.replica import Replica

# Far above any score, so that the noise alone decides.
_SCALE = 1e6


def skew_routing(replica: Replica) -> None:
    """Make every router of this rank choose unevenly. Expert i of a layer is drawn with a probability in proportion to
    1 / (i + 1); the weights remain the router's own."""
    config, tp = replica.config, replica.mesh.tp
    tokens = config.data.seq_len * config.train.micro_batch // (tp.size if tp.sequence else 1)
    for stage in replica.stages:
        for layer, router in stage.vlm.routers.items():
            # Tensor ranks with the same tokens must choose the same experts.
            seed = layer * tp.size + (tp.rank if tp.sequence else 0)
            _replace_preference(router, preferences(router.config, tokens, seed).to(router.weight.device))


def preferences(config: MoeConfig, tokens: int, seed: int) -> Tensor:
    """Biases float32 [T, E] whose `per_token` largest are a draw without replacement from a Zipf distribution (Gumbel
    top-k, arXiv 1903.06059)."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(tokens, config.experts, generator=generator).clamp_(1e-6, 1 - 1e-6)
    gumbel = -(-uniform.log()).log()  # [T, E]
    return _SCALE * (gumbel - torch.arange(1, config.experts + 1).float().log())


def _replace_preference(router: Router, noise: Tensor) -> None:
    """During `forward` the bias of the selection is `noise`; the bias that `Balance` moves stays as it is."""
    forward = router.forward

    def skewed(h: Tensor, packs: int) -> tuple[Tensor, Tensor]:
        bias, router.bias = router.bias, noise
        try:
            return forward(h, packs)
        finally:
            router.bias = bias

    router.forward = skewed
