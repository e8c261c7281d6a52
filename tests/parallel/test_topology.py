import pytest

from megavl.parallel.topology import Topology


def test_tensor_ranks_are_neighbours_and_pipeline_ranks_are_far():
    topology = Topology(pp=2, dp=3, tp=2)
    assert topology.world == 12
    assert topology.groups("tp")[0] == [0, 1]
    assert topology.groups("dp")[0] == [0, 2, 4]
    assert topology.groups("pp")[0] == [0, 6]
    assert topology.groups("model")[1] == [2, 3, 8, 9]


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 3, 4), (3, 1, 2), (8, 1, 1), (1, 1, 5)])
def test_coordinates_invert_rank_and_groups_partition_the_world(sizes):
    topology = Topology(*sizes)
    for rank in range(topology.world):
        assert topology.rank(*topology.coordinates(rank)) == rank
    for axis in ("pp", "dp", "tp", "model"):
        assert sorted(sum(topology.groups(axis), [])) == list(range(topology.world))


def test_unknown_axis_is_named():
    with pytest.raises(ValueError, match="no axis 'cp'"):
        Topology(1, 1, 1).groups("cp")
