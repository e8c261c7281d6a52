"""Process groups of this rank, one per axis."""

from dataclasses import dataclass

import torch.distributed as dist

from megavl.parallel.topology import Topology


@dataclass(frozen=True)
class Axis:
    """This rank's place on one axis. An axis of size 1 has no group and no communication."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None


@dataclass(frozen=True)
class TensorAxis(Axis):
    """The tensor axis. With `sequence`, activations between the parallel regions are cut along the tokens; with
    `shares_images`, each rank encodes a part of a micro-batch's images."""

    sequence: bool = False
    shares_images: bool = False


@dataclass(frozen=True)
class ExpertAxis(Axis):
    """The expert axis. With `cut_width`, the experts of a rank are also cut over the tensor axis."""

    cut_width: bool = False


@dataclass(frozen=True)
class Mesh:
    """The axes of this rank; `model` spans the ranks of one replica (pp and tp together), `ep` those that hold
    different experts of a layer, `edp` those that hold the same."""

    topology: Topology
    pp: Axis
    dp: Axis
    tp: TensorAxis
    ep: ExpertAxis
    edp: Axis
    model: Axis


def build_mesh(
    topology: Topology, sequence: bool = False, shares_images: bool = False, cut_width: bool = False
) -> Mesh:
    """Create the groups of `topology` over the default process group. Collective: every rank of the world calls it."""
    rank = dist.get_rank()

    def axis(name: str) -> Axis:
        mine = Axis()
        for ranks in topology.groups(name):
            group = dist.new_group(ranks)
            if rank in ranks:
                mine = Axis(ranks.index(rank), len(ranks), group)
        return mine

    tp, ep = axis("tp"), axis("ep")
    return Mesh(
        topology,
        pp=axis("pp"),
        dp=axis("dp"),
        tp=TensorAxis(tp.rank, tp.size, tp.group, sequence and tp.size > 1, shares_images and tp.size > 1),
        ep=ExpertAxis(ep.rank, ep.size, ep.group, cut_width and tp.size > 1),
        edp=axis("edp"),
        model=axis("model"),
    )
