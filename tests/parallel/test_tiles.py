"""Routes of tiles, by brute force over single tiles and ranks."""

import itertools

import pytest

from megavl.parallel.tiles import EncoderGroup, TileRoutes, even_share, overlap
from megavl.parallel.topology import Topology

TOPOLOGIES = [Topology(*sizes) for sizes in [(1, 1, 1), (2, 1, 1), (1, 3, 1), (2, 2, 2), (3, 1, 2), (1, 2, 4)]]
# Tiles in the packs of up to three data-parallel ranks: many, fewer than ranks, none in some, none at all.
COUNTS = [(17, 3, 0), (1, 0, 2), (0, 5, 5), (0, 0, 0), (40, 40, 40)]


def groups(topology: Topology, whole_world: bool) -> list[list[EncoderGroup]]:
    """The groups of a world, each as what its ranks know."""
    of_ranks = [EncoderGroup.of(topology, rank, whole_world) for rank in range(topology.world)]
    members = {group.ranks: [] for group in of_ranks}
    for group in of_ranks:
        members[group.ranks].append(group)
    return list(members.values())


def every_group() -> list:
    return [
        pytest.param(topology, counts[: topology.dp], members, id=f"{topology} {counts} {members[0].replicas}")
        for topology, counts, whole_world in itertools.product(TOPOLOGIES, COUNTS, (False, True))
        for members in groups(topology, whole_world)
    ]


def owner(tile: int, counts: tuple[int, ...]) -> int:
    """Data-parallel rank whose packs have a tile."""
    return next(rank for rank in range(len(counts)) if tile < sum(counts[: rank + 1]))


def routes_of(counts: tuple[int, ...], members: list[EncoderGroup]) -> TileRoutes:
    """What all members agree on."""
    routes = [member.routes(counts) for member in members]
    assert all(each == routes[0] for each in routes)
    assert [member.rank for member in members] == list(range(len(members)))
    return routes[0]


@pytest.mark.parametrize(("topology", "counts", "members"), every_group())
def test_each_tile_is_encoded_once_and_by_equal_shares(topology, counts, members):
    routes, replicas = routes_of(counts, members), members[0].replicas
    tiles = [tile for tile in range(sum(counts)) if owner(tile, counts) in replicas]
    assert [tile for run in routes.encoded for tile in run] == tiles
    assert routes.tiles == len(tiles)
    sizes = list(map(len, routes.encoded))
    assert max(sizes) - min(sizes) <= 1
    assert [member.share(counts) for member in members] == list(routes.encoded)


@pytest.mark.parametrize(("topology", "counts", "members"), every_group())
def test_features_come_in_order_to_every_tensor_rank_of_the_first_stage_alone(topology, counts, members):
    routes = routes_of(counts, members)
    arrived = exchange(routes.encoded, routes.needed, [routes.features(rank) for rank in range(len(members))])
    for world_rank, tiles in zip(members[0].ranks, arrived, strict=True):
        pipeline, replica, _ = topology.coordinates(world_rank)
        own = [tile for tile in range(sum(counts)) if owner(tile, counts) == replica]
        assert tiles == (own if pipeline == 0 else [])


@pytest.mark.parametrize(("topology", "counts", "members"), every_group())
def test_one_gradient_of_each_tile_returns_to_where_it_was_encoded(topology, counts, members):
    routes = routes_of(counts, members)
    arrived = exchange(routes.returned, routes.encoded, [routes.gradients(rank) for rank in range(len(members))])
    assert arrived == [list(run) for run in routes.encoded]
    for run, needed in zip(routes.returned, routes.needed, strict=True):
        assert set(run) <= set(needed)
    # The tensor ranks of a replica share the work.
    for replica in members[0].replicas:
        first_stage = {topology.rank(0, replica, tensor) for tensor in range(topology.tp)}
        sizes = [len(run) for rank, run in zip(members[0].ranks, routes.returned, strict=True) if rank in first_stage]
        assert max(sizes) - min(sizes) <= 1


def exchange(held: tuple[range, ...], wanted: tuple[range, ...], sizes: list) -> list[list[int]]:
    """An all-to-all of tiles by their split sizes: what each rank has afterwards. A rank sends, rank by rank, what that
    one wants of its own."""
    ranks = range(len(held))
    sent = [[tile for to in ranks for tile in held[rank] if tile in wanted[to]] for rank in ranks]
    for rank in ranks:
        assert sum(sizes[rank][0]) == len(sent[rank])
        assert sizes[rank][1] == [sizes[source][0][rank] for source in ranks]
    arrived = []
    for rank in ranks:
        starts = [sum(sizes[source][0][:rank]) for source in ranks]
        arrived.append([tile for source in ranks for tile in sent[source][starts[source] :][: sizes[source][0][rank]]])
    return arrived


def test_a_share_of_nothing_is_empty_and_runs_that_do_not_meet_have_nothing_in_common():
    assert [list(even_share(range(3, 8), rank, 3)) for rank in range(3)] == [[3], [4, 5], [6, 7]]
    assert [len(even_share(range(5, 5), rank, 4)) for rank in range(4)] == [0] * 4
    assert overlap(range(4), range(2, 9)) == range(2, 4)
    assert not overlap(range(2), range(5, 9)) and not overlap(range(5, 9), range(2))
