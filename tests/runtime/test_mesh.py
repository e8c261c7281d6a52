"""The mesh of a run: its timeouts."""

import torch
import torch.distributed as dist

from megavl.runtime.mesh import mesh_of
from tests.models import changed
from tests.runtime.cases import run_config


def timeouts_s() -> tuple[float, ...]:
    """Of an axis of two ranks, of one of this rank alone, and of the control group."""
    config = run_config(dist.get_world_size(), train={"timeout_s": 70})
    config = changed(config, data={"timeout_s": 20})
    cpu = torch.device("cpu")
    mesh = mesh_of(config, dist.get_world_size(), cpu)
    groups = (mesh.dp.group, mesh.tp.group, mesh.control)
    return tuple(group._get_backend(cpu).options._timeout.total_seconds() for group in groups)


def test_ranks_wait_longer_for_a_message_than_for_a_tensor_or_for_data(pool):
    assert pool.run(2, timeouts_s) == [(70.0, 70.0, 20.0 + 1800.0)] * 2
