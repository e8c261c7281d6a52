"""The engine's own collectives: how many groups they need, and that none reaches ranks that it should not."""

from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import distributed_c10d

from megavl.config.run import RunConfig
from megavl.ops.dispatch import choose
from megavl.parallel.groups import Axis, build_mesh
from megavl.parallel.topology import Topology
from megavl.runtime.deepspeed.clipping import clip_and_keep_norm
from megavl.runtime.deepspeed.start import start_deepspeed
from megavl.runtime.mesh import mesh_of
from megavl.runtime.replica import Replica
from megavl.runtime.stage import build_stages
from tests.pool import fake_world
from tests.runtime.cases import MODEL, VL2, run_config

WORLD = 512
# Model, what is parallel, calls of new_group by one rank.
LARGE = [
    (MODEL, {}, 4),
    (MODEL, {"zero": 0}, 4),
    (MODEL, {"zero": 3}, 4),
    (MODEL, {"tensor": 2, "sequence": True, "pipeline": 2, "schedule": "interleaved", "virtual_stages": 2}, 7),
    (VL2["base"], {"tensor": 2, "pipeline": 2, "expert": 4}, 7),
    (VL2["base"], {"tensor": 2, "pipeline": 2, "expert": 4, "expert_width": "cut", "zero": 0}, 7),
    (VL2["tiny"], {"expert": 2, "zero": 2}, 5),
]


def calls_of_new_group(configs: list[RunConfig], rank: int) -> list[int]:
    """By one rank of 512, of each run until its engine and its pipeline stand."""
    fake_world(WORLD, rank)
    start_deepspeed("fake")
    cpu, counts = torch.device("cpu"), []
    for config in configs:
        with mock.patch.object(
            distributed_c10d, "_new_group_with_tag", wraps=distributed_c10d._new_group_with_tag
        ) as calls:
            mesh, ops = mesh_of(config, WORLD, cpu), choose(cpu)
            stages = build_stages(config, mesh, ops, cpu)
            Replica(config, mesh, ops, stages)
        counts.append(calls.call_count)
    return counts


@pytest.mark.parametrize("rank", [5, 300])
def test_deepspeed_needs_no_group_beyond_those_of_the_mesh(pool, rank):
    configs = [
        run_config(WORLD, model=model, parallel=parallel, train={"global_batch": WORLD}) for model, parallel, _ in LARGE
    ]
    (counts,) = pool.run(1, calls_of_new_group, configs, rank)
    assert counts == [expected for _, _, expected in LARGE]


def norms() -> tuple[float, float]:
    """Gradient norm of this rank's gradient (3, 4), which is 5, over the groups of the mesh and over none."""
    mesh = build_mesh(Topology(pp=1, dp=2, tp=1))
    module = nn.Linear(2, 1, bias=False)
    found = []
    for used in (mesh, replace(mesh, model=Axis())):
        module.weight.grad = torch.tensor([[3.0, 4.0]])
        adam = torch.optim.AdamW(module.parameters(), fused=True)
        engine = SimpleNamespace(
            module=module, device=torch.device("cpu"), gradient_clipping=lambda: 1.0, basic_optimizer=adam
        )
        clip_and_keep_norm(engine, used)
        found.append(engine._global_grad_norm.item())
    assert dist.get_world_size() == 2
    return tuple(found)


def test_the_norm_of_a_replica_is_not_summed_over_the_world(pool):
    """Negative control: without the group of one rank it would be."""
    for norm, without_group in pool.run(2, norms):
        assert norm == 5.0
        assert without_group == pytest.approx(50**0.5)
