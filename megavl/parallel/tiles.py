"""Which rank encodes which tile of a step, and which rank needs its features, where tiles are encoded before the passes
(`parallel.vision: pipelined, balanced`).

The tiles of the global batch are numbered in the order of its packs. A group of ranks, one replica or the world, shares
those of its packs: each rank encodes a run of them, and the runs differ by at most one tile. Every tile costs the same,
so the number of tiles is the cost. Features go to the tensor ranks of the first stage of the replica that has the pack;
gradients return, each from one of these ranks. All sizes follow from the numbers of tiles, without communication.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megavl.parallel.topology import Topology


def even_share(whole: range, rank: int, size: int) -> range:
    """Run `rank` of `size` runs that `whole` is cut into; their lengths differ by at most one."""
    total = len(whole)
    return range(whole.start + rank * total // size, whole.start + (rank + 1) * total // size)


def overlap(one: range, other: range) -> range:
    """What two runs have in common; an empty run if there is nothing."""
    start = max(one.start, other.start)
    return range(start, max(start, min(one.stop, other.stop)))


@dataclass(frozen=True)
class TileRoutes:
    """Runs of tiles by rank of the group, in their numbering over the global batch.

    encoded:  those that a rank encodes
    needed:   those whose features a rank needs: all of its replica's on pipeline rank 0, none elsewhere
    returned: those whose gradients a rank returns; the tensor ranks, whose gradients are equal, share them
    """

    encoded: tuple[range, ...]
    needed: tuple[range, ...]
    returned: tuple[range, ...]

    @property
    def tiles(self) -> int:
        """Number of tiles in all packs of the group."""
        return sum(map(len, self.encoded))

    def features(self, rank: int) -> tuple[list[int], list[int]]:
        """Tiles whose features `rank` sends to each rank, and receives from each."""
        return _sizes(self.encoded[rank], self.needed), _sizes(self.needed[rank], self.encoded)

    def gradients(self, rank: int) -> tuple[list[int], list[int]]:
        """Tiles whose gradients `rank` sends to each rank, and receives from each."""
        return _sizes(self.returned[rank], self.encoded), _sizes(self.encoded[rank], self.returned)


@dataclass(frozen=True)
class EncoderGroup:
    """The ranks that share the tiles of their packs.

    topology: of the world
    ranks:    ranks of the world, in the order of the process group
    rank:     place of this rank among them
    replicas: data-parallel ranks that they make up
    """

    topology: Topology
    ranks: tuple[int, ...]
    rank: int
    replicas: range

    @classmethod
    def of(cls, topology: Topology, world_rank: int, whole_world: bool) -> "EncoderGroup":
        """The group of a rank: the world, or the rank's replica."""
        if whole_world:
            return cls(topology, tuple(range(topology.world)), world_rank, range(topology.dp))
        _, replica, _ = topology.coordinates(world_rank)
        ranks = tuple(topology.groups("model")[replica])
        return cls(topology, ranks, ranks.index(world_rank), range(replica, replica + 1))

    def routes(self, by_replica: Sequence[int]) -> TileRoutes:
        """The routes of a step.

        Args:
            by_replica: tiles in the packs of each data-parallel rank
        """
        borders = [sum(by_replica[:replica]) for replica in range(len(by_replica) + 1)]
        whole = range(borders[self.replicas.start], borders[self.replicas.stop])
        needed, returned = [], []
        for world_rank in self.ranks:
            pipeline, replica, tensor = self.topology.coordinates(world_rank)
            first, stop = borders[replica : replica + 2]
            needed.append(range(first, stop if pipeline == 0 else first))
            returned.append(even_share(needed[-1], tensor, self.topology.tp))
        encoded = tuple(even_share(whole, rank, len(self.ranks)) for rank in range(len(self.ranks)))
        return TileRoutes(encoded, tuple(needed), tuple(returned))

    def share(self, by_replica: Sequence[int]) -> range:
        """The tiles that this rank encodes."""
        return self.routes(by_replica).encoded[self.rank]


def _sizes(own: range, of_ranks: Sequence[range]) -> list[int]:
    return [len(overlap(own, theirs)) for theirs in of_ranks]
