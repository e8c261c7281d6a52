"""Process groups of a mesh: their members, their number, their first collective."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from megavl.parallel.groups import build_mesh
from megavl.parallel.topology import Topology
from tests.pool import fake_world

AXES = ("pp", "dp", "tp", "ep", "edp", "model")
# 512 ranks: the recipes' kinds of topologies, and one in which every axis has several ranks.
LARGE = [
    Topology(pp=1, dp=512, tp=1),
    Topology(pp=8, dp=32, tp=2),
    Topology(pp=1, dp=64, tp=8, ep=8),
    Topology(pp=8, dp=32, tp=2, ep=8),
    Topology(pp=16, dp=32, tp=1, ep=32),
    Topology(pp=512, dp=1, tp=1),
]
SMALL = [Topology(pp=2, dp=2, tp=2, ep=2), Topology(pp=1, dp=8, tp=1, ep=4), Topology(pp=4, dp=1, tp=2)]


def members(group: dist.ProcessGroup) -> list[int]:
    return dist.get_process_group_ranks(group)


def members_and_calls(topologies: list[Topology], rank: int) -> list[tuple[dict, list[int], int]]:
    """Of each topology on 512 ranks: members of each axis's group and of the control group, calls of new_group."""
    fake_world(512, rank)
    found = []
    for topology in topologies:
        with mock.patch.object(
            distributed_c10d, "_new_group_with_tag", wraps=distributed_c10d._new_group_with_tag
        ) as calls:
            mesh = build_mesh(topology)
        axes = {name: members(getattr(mesh, name).group) for name in AXES}
        found.append((axes, members(mesh.control), calls.call_count))
    return found


@pytest.mark.parametrize("rank", [0, 301, 511])
def test_a_rank_of_512_creates_few_groups(pool, rank):
    (found,) = pool.run(1, members_and_calls, LARGE, rank)
    for topology, (axes, control, calls) in zip(LARGE, found, strict=True):
        for name, ranks in axes.items():
            assert rank in ranks and ranks in topology.groups(name), name
        assert control == list(range(512))
        several = [name for name, ranks in axes.items() if len(ranks) > 1]
        # The control group, one for each axis of several ranks, and one of this rank alone for all the others.
        assert calls == 1 + len(several) + (len(several) < len(AXES)) <= 7


def test_the_groups_of_an_axis_are_different_colors_of_one_split():
    """NCCL splits the communicator of the world by a hash of the ranks: equal hashes would merge two groups."""
    for topology in LARGE:
        for name in AXES:
            groups = topology.groups(name)
            assert len({distributed_c10d._process_group_color(ranks) for ranks in groups}) == len(groups)


def sums(topologies: list[Topology]) -> list[dict[str, float]]:
    """Of each topology and axis, the sum of the ranks in the group."""
    found = []
    for topology in topologies:
        mesh, row = build_mesh(topology), {}
        for name in (*AXES, "control"):
            group = mesh.control if name == "control" else getattr(mesh, name).group
            total = torch.tensor(float(dist.get_rank()))
            dist.all_reduce(total, group=group)
            row[name] = total.item()
        found.append(row)
    return found


def test_a_collective_stays_in_the_group_of_its_axis(pool):
    for rank, found in enumerate(pool.run(8, sums, SMALL)):
        for topology, row in zip(SMALL, found, strict=True):
            assert row.pop("control") == sum(range(8))
            for name, total in row.items():
                (ranks,) = (ranks for ranks in topology.groups(name) if rank in ranks)
                assert total == sum(ranks), (topology, name)


def first_collectives(topology: Topology) -> tuple[list[str], list[str]]:
    """The axes of several ranks, and the axis of every all-reduce that the mesh begins with."""
    with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as calls:
        mesh = build_mesh(topology)
    several = [name for name in AXES if getattr(mesh, name).size > 1]
    labels = {f"megavl:{name}": name for name in AXES}
    return several, [labels[call.kwargs["group"].group_desc] for call in calls.call_args_list]


def test_every_axis_of_several_ranks_is_connected_once(pool):
    for several, connected in pool.run(4, first_collectives, Topology(pp=2, dp=2, tp=1)):
        assert several == ["pp", "dp", "edp", "model"]
        assert sorted(connected) == sorted(several)
