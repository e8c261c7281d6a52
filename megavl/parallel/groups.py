"""Process groups of this rank: one per axis, and one over the world for control messages."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megavl.parallel.topology import Topology


@dataclass(frozen=True)
class Axis:
    """This rank's place on one axis. Layers do not communicate over an axis of size 1.

    On a mesh from `build_mesh` the group of such an axis holds this rank alone, because a group of None is the world to
    torch's collectives. None stands for a process without process groups.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None


def _call(function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    return function(*inputs)


@dataclass(frozen=True)
class TensorAxis(Axis):
    """The tensor axis.

    sequence:      activations between the parallel regions are cut along the tokens
    shares_images: each rank encodes a part of a micro-batch's images
    call:          (function, *inputs) -> function(*inputs), which calls the all-gathers of tokens; selective
                   recomputation replaces it, to repeat them in the backward pass
    gathers_again: products at the beginning of a parallel region keep this rank's tokens alone, and repeat the
                   all-gather in the backward pass themselves
    """

    sequence: bool = False
    shares_images: bool = False
    call: Callable[..., Tensor] = _call
    gathers_again: bool = False


def _read_sizes(sizes: Tensor, rows: int) -> list[list[int]]:
    return sizes.tolist()  # the one wait for the device in a pass: an all-to-all takes its sizes on the host


@dataclass(frozen=True)
class ExpertAxis(Axis):
    """The expert axis.

    cut_width:  the experts of a rank are also cut over the tensor axis
    read_sizes: (rows to and from each rank, int64 [2, size]; rows of this rank) -> the same on the host; replaced where
                tensors have no values
    """

    cut_width: bool = False
    read_sizes: Callable[[Tensor, int], list[list[int]]] = _read_sizes


@dataclass(frozen=True)
class Mesh:
    """The axes of this rank; `model` spans the ranks of one replica (pp and tp together), `ep` those that hold
    different experts of a layer, `edp` those that hold the same.

    control: gloo group over the world for agreement, objects and checkpoints; None in a process without process groups
    """

    topology: Topology
    pp: Axis
    dp: Axis
    tp: TensorAxis
    ep: ExpertAxis
    edp: Axis
    model: Axis
    control: dist.ProcessGroup | None = None


def build_mesh(
    topology: Topology,
    sequence: bool = False,
    shares_images: bool = False,
    cut_width: bool = False,
    *,
    device: torch.device | None = None,
    timeout: timedelta | None = None,
    control_timeout: timedelta | None = None,
) -> Mesh:
    """Create the groups of this rank over the default process group. Collective: every rank of the world calls it.

    Args:
        device: of the tensors that the axes will carry; default: the CPU
        timeout: of the collectives of the axes; default: torch's
        control_timeout: of the collectives of `Mesh.control`; default: torch's
    """
    rank = dist.get_rank()
    # NCCL moves device tensors only, and its watchdog would abort ranks that wait for a slow disk.
    backend = "gloo" if dist.get_backend() == "nccl" else None
    control = _new_group(None, "control", control_timeout, backend)
    groups: dict[str, dist.ProcessGroup] = {}

    def axis(name: str) -> Axis:
        ranks = next(ranks for ranks in topology.groups(name) if rank in ranks)
        label = name if len(ranks) > 1 else "self"
        if label not in groups:
            groups[label] = _new_group(ranks, label, timeout)
        return Axis(ranks.index(rank), len(ranks), groups[label])

    tp, ep = axis("tp"), axis("ep")
    mesh = Mesh(
        topology,
        pp=axis("pp"),
        dp=axis("dp"),
        tp=TensorAxis(tp.rank, tp.size, tp.group, sequence and tp.size > 1, shares_images and tp.size > 1),
        ep=ExpertAxis(ep.rank, ep.size, ep.group, cut_width and tp.size > 1),
        edp=axis("edp"),
        model=axis("model"),
        control=control,
    )
    _connect((group for label, group in groups.items() if label != "self"), device)
    return mesh


def _new_group(
    ranks: list[int] | None, label: str, timeout: timedelta | None, backend: str | None = None
) -> dist.ProcessGroup:
    """A group of which this rank is a member; the other groups of the axis are created by their own members.

    Every rank creates its groups in the same order of axes, and the sizes of the axes are the same on all ranks. Three
    things depend on that order:
    - A member that waits for another waits for one that is at the same axis or an earlier one, so there is no cycle.
    - torch names a locally synchronised group by its ranks and the number of existing groups; members must count alike.
    - With a device bound to the default group NCCL splits the communicator of the world, which is collective over the
      world. The groups of one axis are a partition of it, and all ranks split at the same axis.
    """
    return dist.new_group(
        ranks, timeout=timeout, backend=backend, use_local_synchronization=True, group_desc=f"megavl:{label}"
    )


def _connect(groups: Iterable[dist.ProcessGroup], device: torch.device | None) -> None:
    """Connect the communicators by one small all-reduce each.

    NCCL would connect the pipeline's at its first mixed send and receive, which can hang across nodes
    (pytorch/pytorch#160210).
    """
    for group in groups:
        dist.all_reduce(torch.zeros(1, device=device), group=group)
