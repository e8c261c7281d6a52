"""The router against its formulas, and the layer of experts on meshes of ranks against one process."""

from itertools import product

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megavl.config.model import MoeConfig
from megavl.model import moe
from megavl.model.moe import Experts, Moe, Router
from megavl.ops.dispatch import choose
from megavl.parallel.groups import ExpertAxis, TensorAxis, build_mesh
from megavl.parallel.shard import shard_of
from megavl.parallel.topology import Topology
from tests.models import SIGMOID_ROUTER, changed

OPS = choose(torch.device("cpu"))
D, T, PACKS = 12, 24, 3
SOFTMAX = MoeConfig(experts=8, per_token=3, shared=2, width=10)
SIGMOID = changed(SOFTMAX, **SIGMOID_ROUTER)
CONFIGS = [SOFTMAX, SIGMOID, changed(SOFTMAX, normalise=True, scale=1.5)]
AUXILIARY_SCALE = 0.7


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def fill(module: torch.nn.Module) -> torch.nn.Module:
    """Values of order 1 behind each product, and biases that change what is chosen."""
    for seed, parameter in enumerate(module.parameters()):
        full = random(seed, *shard_of(parameter).full_shape(tuple(parameter.shape)))
        parameter.copy_(shard_of(parameter).slice(full) / full.shape[-1] ** 0.5)
    for router in (part for part in module.modules() if isinstance(part, Router)):
        if router.bias is not None:
            router.bias.copy_(random(99, len(router.bias)) / 4)
    return module


def router(config: MoeConfig) -> Router:
    return fill(Router(config, D, TensorAxis(), OPS, AUXILIARY_SCALE))


def layer(config: MoeConfig) -> Moe:
    return fill(Moe(config, D, TensorAxis(), ExpertAxis(), OPS, AUXILIARY_SCALE))


@pytest.mark.parametrize("config", CONFIGS, ids=["softmax", "sigmoid", "normalised softmax"])
def test_weights_and_experts_of_a_token(config):
    """Token by token. The bias chooses, and is in no weight."""
    subject, h = router(config), random(50, T, D)
    weights, experts = subject(h, PACKS)
    without_bias = 0
    for token in range(T):
        logits = subject.weight @ h[token]
        scores = logits.exp() / logits.exp().sum() if config.router == "softmax" else 1 / (1 + (-logits).exp())
        preferred = scores if subject.bias is None else scores + subject.bias
        best = sorted(range(config.experts), key=lambda e: -preferred[e])[: config.per_token]
        without_bias += set(best) == set(scores.topk(config.per_token).indices.tolist())
        total = sum(scores[expert] for expert in best) if config.normalise else 1.0
        expected = {expert: (config.scale * scores[expert] / total).item() for expert in best}
        assert dict(zip(experts[token].tolist(), weights[token].tolist(), strict=True)) == pytest.approx(expected)
    assert (without_bias == T) == (config.router == "softmax")
    assert weights.dtype == torch.float32


@pytest.mark.parametrize("config", [SOFTMAX, SIGMOID], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize("packs", [1, 3])
def test_auxiliary_loss_and_its_gradient(config, packs):
    """Against the formula as a term of the loss, pack by pack."""
    subject, h, upstream = router(config), random(51, T, D).requires_grad_(), random(52, T, config.per_token)
    weights, experts = subject(h, packs)
    (weights * upstream).sum().backward()

    plain, h_ = router(config), h.detach().clone().requires_grad_()
    logits = F.linear(h_, plain.weight)
    scores = logits.softmax(1) if config.router == "softmax" else logits.sigmoid()
    shares = scores if config.router == "softmax" else scores / scores.sum(1, keepdim=True)
    auxiliary = torch.zeros(())
    for pack in torch.arange(T).chunk(packs):
        for expert in range(config.experts):
            chosen = (experts[pack] == expert).sum()
            f = config.experts / (config.per_token * len(pack)) * chosen
            auxiliary = auxiliary + f * shares[pack, expert].mean()
    expected = scores.gather(1, experts)
    if config.normalise:
        expected = expected / expected.sum(1, keepdim=True)
    ((expected * config.scale * upstream).sum() + AUXILIARY_SCALE * auxiliary).backward()
    # measured 1.5e-7 of the value and 2.4e-7
    torch.testing.assert_close(subject.auxiliary, auxiliary.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(h.grad, h_.grad, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(subject.weight.grad, plain.weight.grad, rtol=1e-5, atol=2e-6)
    assert torch.equal(subject.load, experts.flatten().bincount(minlength=config.experts))


def test_a_perfectly_even_router_has_auxiliary_loss_one():
    subject = router(changed(SOFTMAX, per_token=8))
    subject(random(53, T, D), 1)[0].sum().backward()
    assert subject.auxiliary.item() == pytest.approx(1.0)


def test_what_counts():
    """A recomputed forward pass counts once, and gives the same gradients; one without a gradient does not count."""
    plain, recomputed = layer(SIGMOID), layer(SIGMOID)
    h, h_ = random(54, T, D).requires_grad_(), random(54, T, D).requires_grad_()
    for _ in range(2):
        plain(h, PACKS).sum().backward()
        checkpoint(recomputed, h_, PACKS, use_reentrant=False).sum().backward()
    assert plain.router.load.sum() == 2 * T * SIGMOID.per_token
    assert torch.equal(plain.router.load, recomputed.router.load)
    assert torch.equal(plain.router.auxiliary, recomputed.router.auxiliary)
    assert torch.equal(h.grad, h_.grad)
    for ours, theirs in zip(plain.parameters(), recomputed.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    with torch.no_grad():
        plain(h, PACKS)
    assert torch.equal(plain.router.load, recomputed.router.load)


def test_a_cast_leaves_bias_and_auxiliary_in_fp32():
    subject = layer(SIGMOID)
    bias = subject.router.bias.clone()
    subject.to(torch.bfloat16)
    assert torch.equal(subject.router.bias, bias) and subject.router.bias.dtype == torch.float32
    assert subject.router.auxiliary.dtype == torch.float32
    assert {parameter.dtype for parameter in subject.parameters()} == {torch.bfloat16}
    assert "router.bias" in subject.state_dict() and not {"router.load", "router.auxiliary"} & set(subject.state_dict())
    h = random(55, T, D).bfloat16().requires_grad_()
    subject(h, PACKS).sum().backward()
    assert h.grad.dtype == torch.bfloat16
    assert subject.router.load.sum() == T * SIGMOID.per_token


@pytest.mark.parametrize("config", [SOFTMAX, SIGMOID], ids=["softmax", "sigmoid"])
def test_the_layer_is_the_sum_of_its_experts(config):
    """Against all experts on all tokens: every weight's gradient included."""
    subject, plain = layer(config), layer(config)
    h, h_ = random(56, T, D).requires_grad_(), random(56, T, D).requires_grad_()
    y = subject(h, PACKS)
    (y * random(57, T, D)).sum().backward()

    def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T

    shared, experts = plain.shared, plain.experts
    weights, chosen = plain.router(h_, PACKS)
    dense = torch.zeros(T, config.experts).scatter(1, chosen, weights)  # [T, E]
    y_ = swiglu(h_, shared.gate_proj.weight, shared.up_proj.weight, shared.down_proj.weight)
    for expert in range(config.experts):
        matrices = (stack[expert] for stack in (experts.gate_proj, experts.up_proj, experts.down_proj))
        y_ = y_ + dense[:, expert, None] * swiglu(h_, *matrices)
    (y_ * random(57, T, D)).sum().backward()
    torch.testing.assert_close(y, y_, rtol=1e-5, atol=2e-6)  # measured 2.4e-7
    torch.testing.assert_close(h.grad, h_.grad, rtol=1e-5, atol=5e-6)  # measured 4.8e-7
    for ours, theirs in zip(subject.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=5e-6)


def test_experts_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="moe.experts = 8 is not divisible by parallel.expert = 3"):
        Experts(SOFTMAX, D, TensorAxis(), ExpertAxis(size=3), OPS)
    with pytest.raises(ValueError, match="moe.width = 10 is not divisible by parallel.tensor = 4"):
        Experts(SOFTMAX, D, TensorAxis(size=4), ExpertAxis(cut_width=True), OPS)


def on_ranks(topology: Topology, sequence: bool, cut_width: bool, config: MoeConfig, recompute: bool) -> dict:
    """Worst differences of this rank from one process, in which the data ranks' tokens come one after another."""
    mesh = build_mesh(topology, sequence, cut_width=cut_width)
    tp, dp, ep = mesh.tp, mesh.dp, mesh.ep
    tokens = [(random(200 + rank, T, D), random(300 + rank, T, D)) for rank in range(topology.dp)]

    def mine(full: Tensor) -> Tensor:
        return full.chunk(tp.size)[tp.rank] if tp.sequence else full

    subject = fill(Moe(config, D, tp, ep, OPS, AUXILIARY_SCALE))
    h, upstream = (mine(full) for full in tokens[dp.rank])
    h = h.clone().requires_grad_()
    y = checkpoint(subject, h, PACKS, use_reentrant=False) if recompute else subject(h, PACKS)
    y.backward(upstream)
    load = subject.router.load.clone()
    if tp.sequence:
        dist.all_reduce(load, group=tp.group)

    # What its own tokens make of each parameter, and of routed experts what those of all ranks do that send it rows.
    senders = range(dp.rank // ep.size * ep.size, (dp.rank // ep.size + 1) * ep.size)
    expected, of_all = None, {}
    for rank in senders:
        plain = layer(config)
        h_ = tokens[rank][0].clone().requires_grad_()
        y_ = plain(h_, PACKS)
        y_.backward(tokens[rank][1])
        for name, parameter in plain.named_parameters():
            of_all[name] = of_all.get(name, 0) + parameter.grad
        if rank == dp.rank:
            expected = y_.detach(), h_.grad, plain
    y_, h_grad, plain = expected
    assert torch.equal(load, plain.router.load)
    pairs = {
        "output": (y.detach(), mine(y_)),
        "input": (h.grad, mine(h_grad)),
        "auxiliary": (subject.router.auxiliary, plain.router.auxiliary),
    }
    for (name, ours), theirs in zip(subject.named_parameters(), plain.parameters(), strict=True):
        full = of_all[name] if name.startswith("experts") else theirs.grad
        pairs[name] = (ours.grad, shard_of(ours).slice(full))
    return {name: ((a - b).abs() / (1 + b.abs())).max().item() for name, (a, b) in pairs.items()}


MESHES = {
    2: [Topology(pp=1, dp=2, tp=1, ep=2), Topology(pp=1, dp=1, tp=2)],
    4: [
        Topology(pp=1, dp=4, tp=1, ep=2),
        Topology(pp=1, dp=4, tp=1, ep=4),
        Topology(pp=1, dp=2, tp=2),
        Topology(pp=1, dp=2, tp=2, ep=2),
    ],
    8: [Topology(pp=1, dp=4, tp=2, ep=4)],
}


def cases(world: int) -> list[tuple]:
    """Topology, sequence, cut width, router, recomputed."""
    return [
        (mesh, sequence, cut_width, config, sequence != cut_width)
        for mesh in MESHES[world]
        for sequence, cut_width in product((False, True), repeat=2)
        for config in (SOFTMAX, SIGMOID)
        if mesh.tp > 1 or not (sequence or cut_width)
    ]


def all_cases() -> list[dict]:
    return [on_ranks(*case) for case in cases(dist.get_world_size())]


@pytest.mark.parametrize("world", MESHES)
def test_a_mesh_equals_one_process(pool, world):
    for worst in pool.run(world, all_cases):
        for case, differences in zip(cases(world), worst, strict=True):
            assert max(differences.values()) < 5e-6, (case, differences)  # measured 1.4e-6


def forgotten(sum_over_ranks: str, sequence: bool) -> dict:
    """Two tensor ranks, where one of the sums over them is left out."""
    plain = getattr(moe, sum_over_ranks)
    setattr(moe, sum_over_ranks, lambda x, axis: x)
    worst = on_ranks(Topology(pp=1, dp=1, tp=2), sequence, False, SOFTMAX, False)
    setattr(moe, sum_over_ranks, plain)
    return worst


def forgotten_sums() -> list[dict]:
    return [
        forgotten("copy", False),
        forgotten("copy", True),
        forgotten("shared_weight", True),
        forgotten("reduce", True),
    ]


def test_a_sum_that_is_forgotten_is_noticed(pool):
    for experts, experts_in_sequence, weight, auxiliary in pool.run(2, forgotten_sums):
        for differences in (experts, experts_in_sequence):
            assert differences["experts.gate_proj"] > 1e-2
            assert differences["input"] < 5e-6
        assert weight["router.weight"] > 1e-2 and weight["input"] < 5e-6
        # A pack that lies on both ranks.
        assert min(auxiliary[name] for name in ("auxiliary", "input", "router.weight")) > 1e-3
        assert auxiliary["output"] < 5e-6
