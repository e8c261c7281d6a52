"""What the launcher says of this process. The only file that reads or writes os.environ.

`deepspeed` and `torchrun` set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; under `srun` the SLURM_* names
say the same, but for the address, which the job script exports. Without any of them this is a run of one process.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from megavl.runtime.deepspeed.start import device_type, start_deepspeed, use_cpu


class LaunchError(ValueError):
    """The processes of the run cannot start together. Some ranks may raise it while others do not."""


@dataclass(frozen=True)
class Env:
    """This process among the processes of the run."""

    rank: int
    local_rank: int
    world: int

    @property
    def device(self) -> torch.device:
        """The CUDA device of this process, or the CPU (DeepSpeed's choice, which DS_ACCELERATOR=cpu forces).

        Raises LaunchError where this process has no CUDA device of its own.
        """
        kind = device_type()
        return torch.device("cuda", self._cuda_index()) if kind == "cuda" else torch.device(kind)

    @property
    def cache_folder(self) -> Path:
        """Where megavl keeps what later runs of this user may need: XDG_CACHE_HOME, or ~/.cache."""
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megavl"

    def _cuda_index(self) -> int:
        """Index of this process's device among those that it sees."""
        visible, listed = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES", "")
        # srun --gpus-per-task shows each task only its own device. Under another launcher a second process that sees
        # one device would share it with the first.
        if visible == 1 and os.environ.get("SLURM_LOCALID") == str(self.local_rank):
            return 0
        if self.local_rank >= visible:
            setting = f"CUDA_VISIBLE_DEVICES={listed}" if listed else "CUDA_VISIBLE_DEVICES is not set"
            raise LaunchError(
                f"rank {self.rank} has local rank {self.local_rank}, but only {visible} CUDA devices are visible "
                f"({setting}), so it has none of its own: start at most one process for each device of a node, or give "
                "each task its own device (srun --gpus-per-task=1; under another launcher with LOCAL_RANK=0 for each)"
            )
        return self.local_rank


def read_env() -> Env:
    """Read the launcher's variables. Raises LaunchError where a launcher left some of them out."""
    if "RANK" in os.environ:
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    elif int(os.environ.get("SLURM_NTASKS", 1)) > 1:
        names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS")
    else:
        return Env(rank=0, local_rank=0, world=1)
    needed = (*names, "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if name not in os.environ]
    if missing:
        raise LaunchError(
            f"the launcher set {names[0]} but not {', '.join(missing)}, so the processes cannot find each other: start "
            "with deepspeed or torchrun, or export MASTER_ADDR (host of rank 0) and MASTER_PORT (a free port) before "
            "srun"
        )
    rank, local_rank, world = (int(os.environ[name]) for name in names)
    return Env(rank, local_rank, world)


@contextmanager
def process_group(env: Env, timeout: timedelta) -> Iterator[None]:
    """Join the other processes; at the end destroy the groups, or abort them after an error.

    Args:
        env: this process
        timeout: of the rendezvous, and of the collectives of the default group

    Raises LaunchError where the processes cannot meet.
    """
    start_process_group(env, timeout)
    try:
        yield
    except BaseException:
        # Destroying a group waits for its collectives, which peers may never join. A failed abort must not hide the
        # error.
        with suppress(Exception):
            distributed_c10d._abort_process_group()
        raise
    dist.destroy_process_group()


def start_process_group(env: Env, timeout: timedelta) -> None:
    """Join the other processes and hand the group to DeepSpeed, which reads the same variables.

    Raises LaunchError where the processes cannot meet.
    """
    device = env.device
    # DeepSpeed takes LOCAL_RANK for the index of the device.
    local_rank = env.local_rank if device.index is None else device.index
    os.environ.update(RANK=str(env.rank), LOCAL_RANK=str(local_rank), WORLD_SIZE=str(env.world))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif "OMP_NUM_THREADS" not in os.environ:
        # torch would start a thread per core in every process, and they would wait for one another.
        torch.set_num_threads(max(1, os.cpu_count() // env.world))
    backend = "nccl" if device.type == "cuda" else "gloo"
    if env.world == 1:
        # No device is bound: the only rank has no peer to connect to, and NCCL's set-up fails on some virtual GPUs
        # (deepspeedai/DeepSpeed#8248).
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        # A bound device makes NCCL connect now, not in the first collective of some rank.
        bound = device if device.type == "cuda" else None
        try:
            dist.init_process_group(backend, rank=env.rank, world_size=env.world, timeout=timeout, device_id=bound)
        except dist.DistNetworkError as error:
            raise LaunchError(
                f"rank {env.rank} found no way to {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} "
                f"({str(error).splitlines()[0]}); another run may have that port: choose one, e.g. --master_port 29501"
            ) from error
    start_deepspeed(backend)


@contextmanager
def fake_process_group(env: Env) -> Iterator[None]:
    """Be a rank of a world whose other ranks do not exist: collectives return at once, and leave their results as they
    are. The device is the CPU.

    Args:
        env: the rank
    """
    # Imported here: it registers the backend, which no run needs.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    use_cpu()
    os.environ.update(RANK=str(env.rank), LOCAL_RANK=str(env.local_rank), WORLD_SIZE=str(env.world))
    dist.init_process_group("fake", store=FakeStore(), rank=env.rank, world_size=env.world)
    try:
        start_deepspeed("fake")
        yield
    finally:
        dist.destroy_process_group()
