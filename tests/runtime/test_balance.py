"""Loads are counted over the whole global batch and biases move by them, alike on every rank."""

from types import SimpleNamespace

import torch
from torch import nn

from megavl.model.moe import Router
from megavl.ops.dispatch import choose
from megavl.parallel.groups import build_mesh
from megavl.parallel.topology import Topology
from megavl.runtime.balance import Balance
from megavl.runtime.stage import build_stages
from tests.runtime.cases import GLOBAL_BATCH, VL2, run_config

# Blocks 1, 2 and 3 have experts: of pipeline rank 0 the first, of rank 1 the others.
HELD = ((1,), (2, 3))
STEP = 0.25


class Stand(nn.Module):
    """A stage of which only the routers matter."""

    def __init__(self, routers: dict[int, Router]):
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))
        self.vlm = SimpleNamespace(routers=routers)


def counted(layer: int, dp: int, tp: int) -> torch.Tensor:
    """What one rank's tokens have chosen."""
    return torch.tensor([layer, 5, 2 * dp, 4, 4, 4, 4 + tp, 0])


def two_steps(topology: Topology, sequence: bool, model: str):
    mesh = build_mesh(topology, sequence)
    decoder, ops = VL2[model].decoder, choose(torch.device("cpu"))
    routers = {layer: Router(decoder.moe, decoder.width, mesh.tp, ops) for layer in HELD[mesh.pp.rank]}
    stages = nn.ModuleList([Stand(routers)])
    balance = {"bias_step": STEP} if model == "base" else {}
    config = run_config(model=VL2[model], balance=balance)
    balance = Balance(stages, config, mesh)
    loads = []
    for _ in range(2):
        for layer, router in routers.items():
            router.load += counted(layer, mesh.dp.rank, mesh.tp.rank if sequence else 0)
            router.auxiliary += layer + mesh.dp.rank
        loads.append(balance.step())
        assert all(not router.load.any() and not router.auxiliary for router in routers.values())
    return loads, {layer: router.bias for layer, router in routers.items()}


def each():
    topology = Topology(pp=2, dp=2, tp=2)
    return {
        sequence: [two_steps(topology, sequence, model) for model in ("base", "small")] for sequence in (True, False)
    }


def check(by_rank, tensor_ranks: int) -> None:
    for (loads, held), (plain, _) in by_rank:
        tokens = torch.stack(
            [sum(counted(layer, dp, tp) for dp in range(2) for tp in range(tensor_ranks)) for layer in (1, 2, 3)]
        )
        mean = tokens.double().mean(1, keepdim=True)
        for number, (load, same) in enumerate(zip(loads, plain, strict=True), start=1):
            assert load.layers == (1, 2, 3)
            assert torch.equal(load.tokens, tokens) and torch.equal(same.tokens, tokens)
            assert load.auxiliary.tolist() == [(2 * layer + 1) / GLOBAL_BATCH for layer in (1, 2, 3)]
            assert torch.equal(load.bias, (number * STEP * (mean - tokens).sign()).float())
            assert same.bias is None
        for layer, bias in held.items():
            assert torch.equal(bias, loads[-1].bias[layer - 1])


def test_all_ranks_know_the_loads_of_all_layers(pool):
    """Tensor ranks count their own tokens under sequence parallelism, and the same ones without."""
    by_rank = pool.run(8, each)
    check([results[True] for results in by_rank], 2)
    check([results[False] for results in by_rank], 1)


def test_a_model_without_experts_has_no_load(pool):
    assert pool.run(1, nothing) == [None]


def scales() -> set[float]:
    """The scale of the auxiliary loss in every router of a run on two data ranks."""
    config = run_config(2, model=VL2["small"], balance={"auxiliary_weight": 0.5}, train={"micro_batch": 6})
    device = torch.device("cpu")
    (stage,) = build_stages(config, build_mesh(Topology(pp=1, dp=2, tp=1)), choose(device), device)
    return {router.auxiliary_scale for router in stage.vlm.routers.values()}


def test_each_pack_has_its_part_in_the_auxiliary_loss(pool):
    assert pool.run(2, scales) == [{0.5 * 2 / GLOBAL_BATCH}] * 2


def nothing():
    mesh = build_mesh(Topology(1, 1, 1))
    return Balance(nn.ModuleList([Stand({})]), run_config(), mesh).step()
