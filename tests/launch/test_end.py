"""Two processes in one process group; each leaves it as a run does."""

import subprocess
import sys
import time

from tests.launch.test_pretrain import ENVIRONMENT, ROOT
from tests.pool import free_port

PROGRAM = """
from datetime import timedelta
import torch, torch.distributed as dist
from megavl.runtime.env import process_group, read_env
env = read_env()
with process_group(env, timeout=timedelta(seconds=600)):
    dist.all_reduce(torch.ones(1))
    if env.rank == 1:
        {end_of_rank_1}
    dist.all_reduce(torch.ones(1))
print("ended", env.rank)
"""


def run(end_of_rank_1: str) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of each rank."""
    variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM.format(end_of_rank_1=end_of_rank_1)],
            cwd=ROOT,
            env=ENVIRONMENT | variables | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=400) for process in processes]
    return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]


def test_ranks_that_succeed_end_without_a_word():
    for rank, (code, output, errors) in enumerate(run("pass")):
        assert (code, output) == (0, f"ended {rank}\n"), errors
        assert "destroy_process_group" not in errors and "Traceback" not in errors


def test_an_error_of_one_rank_ends_both_at_once():
    started = time.monotonic()
    (code, _, errors), (failed, _, failure) = run("raise KeyError('a defect')")
    assert failed == 1 and "KeyError: 'a defect'" in failure
    assert code == 1 and "gloo" in errors  # closed, reset or broken, by the way the sockets end
    assert time.monotonic() - started < 300  # half the timeout of the collective
