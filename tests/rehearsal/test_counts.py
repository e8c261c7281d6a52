"""Kernels, bytes and messages of operations whose counts are known."""

import torch
import torch.distributed as dist

from megavl.parallel.groups import build_mesh
from megavl.parallel.topology import Topology
from megavl.parallel.versions import reduce_scatter_single
from megavl.rehearsal.counts import Counting, Counts, Messages
from tests.pool import fake_world


def counted(work) -> Counts:
    counting = Counting(lambda operation, tensors: None)
    with counting:
        work()
    return counting.counts


def test_views_launch_nothing_and_bytes_are_read_and_written():
    x = torch.ones(4, 8)  # 128 bytes
    assert counted(lambda: x.view(8, 4).t()[1:]) == Counts()
    assert counted(lambda: x + x) == Counts(1, 3 * 128)
    assert counted(lambda: x.sum().item()) == Counts(1, 128 + 4)  # the number is read, which is no kernel


def _messages() -> tuple[Counts, list]:
    fake_world(8, 0)
    mesh = build_mesh(Topology(2, 2, 2))
    x, noted = torch.zeros(16), []
    counting = Counting(lambda operation, tensors: noted.append((operation, len(tensors))))
    with counting:
        dist.all_reduce(x, group=mesh.tp.group)
        dist.all_reduce(x, group=mesh.ep.group)  # of one rank
        reduce_scatter_single(torch.zeros(8), x, group=mesh.dp.group)
        dist.batch_isend_irecv([dist.P2POp(dist.isend, x, group=mesh.pp.group, group_peer=1)])
        dist.all_reduce(x)
    dist.destroy_process_group()
    return counting.counts, noted


def test_messages_by_axis(pool):
    [(counts, noted)] = pool.run(1, _messages)
    assert counts.messages == {
        ("tensor", "all-reduce"): Messages(1, 64),
        ("data", "reduce-scatter"): Messages(1, 64),
        ("pipeline", "send"): Messages(1, 64),
        ("world", "all-reduce"): Messages(1, 64),
    }
    assert [operation for operation, _ in noted] == ["all-reduce", "reduce-scatter", "send", "all-reduce"]
    assert counts.kernels == 1  # torch.zeros
