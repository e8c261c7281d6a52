"""Feed-forward layer of shared and routed experts (DeepSeekMoE, arXiv 2401.06066), dropless.

Source: DeepSeek-VL2 (arXiv 2412.10302) section 3 and `modeling_deepseek.py` of its released code.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd import Function

from megavl.config.model import MoeConfig
from megavl.model.mlp import Mlp
from megavl.ops.dispatch import Ops
from megavl.ops.grouped import Groups
from megavl.ops.zero_gradient import with_zero_gradients
from megavl.parallel.collectives import (
    all_gather,
    copy,
    enter_parallel,
    join,
    leave_parallel,
    reduce,
    shared_weight,
    split,
)
from megavl.parallel.experts import Dispatch
from megavl.parallel.groups import ExpertAxis, TensorAxis
from megavl.parallel.linear import share
from megavl.parallel.shard import mark


class Router(nn.Module):
    """Chooses the experts of each token and says how much each counts. It works in fp32 on the tokens of the residual
    stream: [T, D], or [T / tp, D] under sequence parallelism.

    bias:            float32 [E], of a sigmoid router: takes part in the selection alone (arXiv 2408.15664). Neither a
                     gradient nor an optimizer moves it, and a cast of the model leaves it in fp32
    load:            int64 [E], how often this rank's tokens have chosen each expert since it was last set to 0
    auxiliary:       float32 [], auxiliary loss of the packs of those tokens, summed; equal on all tensor ranks
    auxiliary_scale: gradient of one pack's auxiliary loss (`build_stages` computes it)

    `load` and `auxiliary` grow in the backward pass: a forward pass that is recomputed counts once, and one without a
    gradient not at all.
    """

    def __init__(self, config: MoeConfig, width: int, tp: TensorAxis, ops: Ops, auxiliary_scale: float = 0.0):
        super().__init__()
        self.config, self.tp, self.ops, self.auxiliary_scale = config, tp, ops, auxiliary_scale
        self.weight = nn.Parameter(torch.empty(config.experts, width))
        has_bias = config.router == "sigmoid"
        self.register_buffer("bias", torch.zeros(config.experts, dtype=torch.float32) if has_bias else None)
        self.register_buffer("load", torch.zeros(config.experts, dtype=torch.int64), persistent=False)
        self.register_buffer("auxiliary", torch.zeros((), dtype=torch.float32), persistent=False)

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> "Router":
        # Steps of the bias are around 0.001: in bf16 they would be lost from 0.5 on.
        exact = dict(self.named_buffers())
        super()._apply(function, recurse)
        for name, buffer in self.named_buffers():
            if buffer.dtype != exact[name].dtype:
                setattr(self, name, exact[name].to(buffer.device))
        return self

    def forward(self, h: Tensor, packs: int) -> tuple[Tensor, Tensor]:
        """Weights float32 [T, k] and experts int64 [T, k] of each token, in no order; `packs` as in `PackLayout`."""
        config = self.config
        logits = self.ops.router_logits(h, shared_weight(self.weight, self.tp))  # [T, E]
        scores = logits.softmax(1) if config.router == "softmax" else logits.sigmoid()
        preferred = scores.detach() if self.bias is None else scores.detach() + self.bias
        experts = preferred.topk(config.per_token, sorted=False).indices  # [T, k]
        weights = scores.gather(1, experts)  # [T, k]
        if config.normalise:
            weights = weights / (weights.sum(1, keepdim=True) + 1e-20)  # as released, a sum of 0 is not divided by
        load, auxiliary = self._balance(scores, experts, packs)
        return _Attach.apply(weights * config.scale, auxiliary, load, self), experts

    def _balance(self, scores: Tensor, experts: Tensor, packs: int) -> tuple[Tensor, Tensor]:
        """Load int64 [E] of these tokens, and the auxiliary loss float32 [] of the packs that they are in, summed.

        Of a pack of T tokens it is sum_i f_i P_i (arXiv 2408.15664, eq. 2): f_i = E / (k T) times how often expert i
        was chosen, P_i the mean of its scores; a token's scores by a sigmoid are first divided by their sum
        (DeepSeek-V3, arXiv 2412.19437, eq. 17 to 20). Padding counts as tokens: experts work on it as on all others.
        """
        config, tp = self.config, self.tp
        mine = len(scores)
        first, tokens = (tp.rank * mine, tp.size * mine) if tp.sequence else (0, mine)
        per_pack = tokens // packs
        positions = torch.arange(first, first + mine, device=scores.device)
        pack = torch.arange(packs, device=scores.device)
        member = (positions // per_pack == pack[:, None]).float()  # [packs, T]: products with it sum over a pack
        chosen = torch.zeros_like(scores).scatter_(1, experts, 1.0)  # [T, E]
        shares = scores / scores.sum(1, keepdim=True) if config.router == "sigmoid" else scores
        sums = torch.stack((member @ chosen, member @ shares))  # [2, packs, E]
        if tp.sequence:  # a pack may lie on several ranks
            sums = reduce(sums, tp)
        count, probability = sums
        frequency = count.detach() * (config.experts / (config.per_token * per_pack))
        return chosen.sum(0).long(), (frequency * probability / per_pack).sum()


class _Attach(Function):
    """Identity on `weights`; backward injects the auxiliary-loss gradient and updates the router's counters."""

    @staticmethod
    def forward(ctx, weights: Tensor, auxiliary: Tensor, load: Tensor, router: Router) -> Tensor:
        ctx.router = router
        ctx.save_for_backward(auxiliary, load)
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx, grad: Tensor):
        auxiliary, load = ctx.saved_tensors
        ctx.router.load += load
        ctx.router.auxiliary += auxiliary
        return grad, torch.full_like(auxiliary, ctx.router.auxiliary_scale), None, None


class Experts(nn.Module):
    """This rank's routed experts, each a SwiGLU of its own: [N, D] sorted by expert -> [N, D]. Where `ep.cut_width`
    their channels are cut over the tensor axis and the result is a partial sum; else each is whole on all tensor ranks,
    which bring different tokens. Raises ValueError where experts or channels do not divide."""

    def __init__(self, config: MoeConfig, width: int, tp: TensorAxis, ep: ExpertAxis, ops: Ops):
        super().__init__()
        self.tp, self.ep, self.ops = tp, ep, ops
        count = share(config.experts, ep, "model.decoder.moe.experts", "parallel.expert")
        hidden = share(config.width, tp, "model.decoder.moe.width") if ep.cut_width else config.width

        def stacked(rows: int, columns: int, cut_dim: int) -> nn.Parameter:
            weight = mark(nn.Parameter(torch.empty(count, rows, columns)), 0, ep, "ep")
            return mark(weight, cut_dim, tp) if ep.cut_width else weight

        self.gate_proj = stacked(hidden, width, 1)
        self.up_proj = stacked(hidden, width, 1)
        self.down_proj = stacked(width, hidden, 2)

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        """counts: int64 [E / ep], rows of each expert. If N is 0, the experts get gradients of zeros."""
        weights = (self.gate_proj, self.up_proj, self.down_proj)
        gate, up, down = weights if self.ep.cut_width else (copy(weight, self.tp) for weight in weights)
        if not len(rows):
            return with_zero_gradients(rows, gate, up, down)
        return self.ops.expert_mlp(rows, gate, up, down, Groups(counts))  # [N, D]


class Moe(nn.Module):
    """[T, D] -> [T, D] ([T / tp, D] under sequence parallelism): the shared experts, through which every token goes,
    and the routed ones of each token. The shared ones are one SwiGLU, as wide as all, cut over the tensor axis."""

    def __init__(
        self,
        config: MoeConfig,
        width: int,
        tp: TensorAxis,
        ep: ExpertAxis,
        ops: Ops,
        auxiliary_scale: float = 0.0,
    ):
        super().__init__()
        self.total, self.tp, self.ep, self.ops = config.experts, tp, ep, ops
        self.router = Router(config, width, tp, ops, auxiliary_scale)
        self.shared = Mlp(width, config.shared_width, tp, ops)
        self.experts = Experts(config, width, tp, ep, ops)

    def forward(self, h: Tensor, packs: int) -> Tensor:
        """`packs` as in `PackLayout`."""
        weights, experts = self.router(h, packs)
        x, weights, experts = self._enter(h, weights, experts)
        dispatch = Dispatch(experts, self.total, self.ep, self.ops.permutation)
        under_way = dispatch.start(x)
        shared = self.shared(h)
        rows = dispatch.finish(under_way)
        del under_way  # as large as `rows`
        # The results have no name here, so that `combine` can free them before it is done.
        return shared + self._leave(dispatch.combine(self.experts(rows, dispatch.counts), weights))

    def _enter(self, h: Tensor, weights: Tensor, experts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The tokens that this rank sends to the routed experts: all of the tensor ranks where their width is cut, else
        its own, which without sequence parallelism are a part of those that all ranks have."""
        tp = self.tp
        if self.ep.cut_width:
            experts = all_gather(experts, tp) if tp.sequence else experts
            return enter_parallel(h, tp), enter_parallel(weights, tp), experts
        if tp.sequence:
            return h, weights, experts
        return split(h, tp), split(weights, tp), experts.chunk(tp.size)[tp.rank]

    def _leave(self, routed: Tensor) -> Tensor:
        """Back to the tokens of the residual stream."""
        if self.ep.cut_width:
            return leave_parallel(routed, self.tp)
        return routed if self.tp.sequence else join(routed, self.tp)
