import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator
from torch.distributed import distributed_c10d

from megavl.runtime import env
from megavl.runtime.deepspeed import start
from megavl.runtime.env import Env, LaunchError, process_group, read_env, start_process_group

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID", "SLURM_LOCALID")


@pytest.fixture
def environment(monkeypatch):
    for name in (*NAMES, "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)

    def put(**values: str) -> None:
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return put


def test_no_launcher_is_one_process(environment):
    assert read_env() == Env(rank=0, local_rank=0, world=1)


def test_torchrun_and_deepspeed(environment):
    environment(RANK="5", LOCAL_RANK="1", WORLD_SIZE="8", MASTER_ADDR="a", MASTER_PORT="1")
    assert read_env() == Env(rank=5, local_rank=1, world=8)


def test_srun(environment):
    environment(SLURM_PROCID="9", SLURM_LOCALID="1", SLURM_NTASKS="16", MASTER_ADDR="a", MASTER_PORT="1")
    assert read_env() == Env(rank=9, local_rank=1, world=16)


def test_an_interactive_slurm_shell_is_one_process(environment):
    environment(SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_NTASKS="1")
    assert read_env().world == 1


def test_srun_without_an_address_is_told_what_to_export(environment):
    environment(SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_NTASKS="2")
    with pytest.raises(LaunchError, match="MASTER_ADDR, MASTER_PORT.*before srun"):
        read_env()


@pytest.fixture
def cuda(environment, monkeypatch):
    """Pretend that this process sees so many CUDA devices; returns what NCCL and torch are told then."""
    monkeypatch.setattr(os, "environ", dict(os.environ))  # which start_process_group writes to
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    told = {}

    def see(count: int, **variables: str) -> dict:
        environment(**variables)
        monkeypatch.setattr(start, "get_accelerator", CUDA_Accelerator)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: told.update(current=device))
        monkeypatch.setattr(
            dist, "init_process_group", lambda backend, **options: told.update(options, backend=backend)
        )
        monkeypatch.setattr(env, "start_deepspeed", lambda backend: None)
        return told

    return see


@pytest.mark.parametrize(
    ("visible", "listed", "local_rank", "index"),
    [
        (8, None, 3, 3),
        (2, "5,7", 1, 1),
        (1, None, 0, 0),
        (1, "0", 3, 0),  # srun --gpus-per-task=1
        (1, None, 7, 0),
    ],
)
def test_nccl_torch_and_deepspeed_get_the_same_device(cuda, visible, listed, local_rank, index):
    slurm = {"SLURM_LOCALID": str(local_rank)} if visible == 1 else {}
    told = cuda(visible, **slurm, **({} if listed is None else {"CUDA_VISIBLE_DEVICES": listed}))
    start_process_group(Env(rank=9, local_rank=local_rank, world=16), timedelta(seconds=7))
    device = torch.device("cuda", index)
    assert told["backend"] == "nccl" and told["timeout"] == timedelta(seconds=7)
    assert told["current"] == told["device_id"] == device
    assert os.environ["LOCAL_RANK"] == str(index)


def test_one_process_binds_no_device(cuda):
    told = cuda(1)
    start_process_group(Env(rank=0, local_rank=0, world=1), timedelta(seconds=7))
    assert told["current"] == torch.device("cuda", 0) and "device_id" not in told


@pytest.mark.parametrize(
    ("visible", "listed", "local_rank", "shown"),
    [
        (2, "5,7", 2, "CUDA_VISIBLE_DEVICES=5,7"),
        (1, None, 1, "CUDA_VISIBLE_DEVICES is not set"),
        (1, "0", 1, "CUDA_VISIBLE_DEVICES=0"),  # torchrun --nproc-per-node 2 with one device
    ],
)
def test_a_local_rank_without_a_device_is_refused(cuda, visible, listed, local_rank, shown):
    told = cuda(visible, **({} if listed is None else {"CUDA_VISIBLE_DEVICES": listed}))
    with pytest.raises(
        LaunchError,
        match=f"rank 9 has local rank {local_rank}.* only {visible} CUDA devices are visible .{shown}.*srun",
    ):
        start_process_group(Env(rank=9, local_rank=local_rank, world=16), timedelta(seconds=7))
    assert not told and "LOCAL_RANK" not in os.environ


def test_a_cpu_binds_no_device(environment, monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ | {"OMP_NUM_THREADS": "1"})
    told = {}
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: told.update(options, backend=backend))
    monkeypatch.setattr(env, "start_deepspeed", lambda backend: None)
    start_process_group(Env(rank=1, local_rank=3, world=4), timedelta(seconds=7))
    assert told["backend"] == "gloo" and told["device_id"] is None
    assert os.environ["LOCAL_RANK"] == "3"


def ends(error: Exception | None, abort_fails: bool) -> tuple[bool, list[str], str | None]:
    """Of a process that leaves its group with `error`: whether it had a group, how that ended, what it raises."""
    dist.destroy_process_group()  # the pool's
    ways = []
    abort, destroy = distributed_c10d._abort_process_group, dist.destroy_process_group

    def aborted():
        ways.append("aborted")
        abort()
        if abort_fails:
            raise RuntimeError("unhandled CUDA error")

    def destroyed():
        ways.append("destroyed")
        destroy()

    distributed_c10d._abort_process_group, dist.destroy_process_group = aborted, destroyed
    raised = None
    try:
        with process_group(Env(0, 0, 1), timedelta(seconds=60)):
            had_group = dist.is_initialized()
            if error is not None:
                raise error
    except (ValueError, SystemExit) as caught:
        raised = str(caught)
    assert not dist.is_initialized()
    return had_group, ways, raised


@pytest.mark.parametrize(
    ("error", "abort_fails", "expected"),
    [
        (None, False, (True, ["destroyed"], None)),
        (ValueError("a defect"), False, (True, ["aborted"], "a defect")),
        (ValueError("a defect"), True, (True, ["aborted"], "a defect")),
        (SystemExit("error: a message"), False, (True, ["aborted"], "error: a message")),
    ],
)
def test_groups_are_destroyed_on_success_and_aborted_on_an_error(pool, error, abort_fails, expected):
    assert pool.run(1, ends, error, abort_fails) == [expected]
