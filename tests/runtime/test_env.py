import pytest

from megavl.runtime.env import Env, LaunchError, read_env

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
