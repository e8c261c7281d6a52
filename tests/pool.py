"""Ranks for tests: processes that start fast because torch and DeepSpeed are imported once, in a fork server."""

import multiprocessing
import os
import pickle
import runpy
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.preload"])


def _rank(connection, function: Callable, args: tuple, rank: int, world: int, store: str) -> None:
    """One rank: join a gloo group of `world`, run, send back ("ok", result) or ("error", traceback)."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    try:
        dist.init_process_group(
            "gloo", store=dist.FileStore(store, world), rank=rank, world_size=world, timeout=timedelta(seconds=120)
        )
        dist.barrier()  # a rank that is done at once must not leave while others still connect to it
        outcome = ("ok", function(*args))
    except BaseException:
        outcome = ("error", traceback.format_exc())
    # Pickled by value: multiprocessing would pass tensors as shared memory, which ends with this process.
    connection.send_bytes(pickle.dumps(outcome))
    os._exit(0)  # no teardown: gloo's destructors would wait for ranks that are gone


def _script(path: Path, arguments: list[str], folder: Path, output: str) -> None:
    """Become `python path arguments` in `folder`, with stdout and stderr in files."""
    for descriptor, ending in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{output}.{ending}", os.O_WRONLY | os.O_CREAT), descriptor)
    os.chdir(folder)
    sys.argv, sys.path[0] = [str(path), *arguments], str(path.parent)
    runpy.run_path(str(path), run_name="__main__")


class Pool:
    """Runs a module-level function on every rank of a gloo group, or a script in one process."""

    def script(self, path: Path, arguments: list[str], folder: Path) -> subprocess.CompletedProcess:
        """`python path arguments` in `folder`, without the seconds in which a new interpreter imports torch."""
        with tempfile.TemporaryDirectory() as output:
            process = _CONTEXT.Process(target=_script, args=(path, arguments, folder, f"{output}/script"))
            process.start()
            process.join()
            texts = [Path(f"{output}/script.{ending}").read_text() for ending in ("out", "err")]
        return subprocess.CompletedProcess([str(path), *arguments], process.exitcode, *texts)

    def run(self, world: int, function: Callable, *args) -> list:
        """Results by rank. Raises AssertionError with the tracebacks when a rank fails."""
        with tempfile.TemporaryDirectory() as folder:
            ends, processes = [], []
            for rank in range(world):
                ours, theirs = _CONTEXT.Pipe()
                store = str(Path(folder) / "store")
                process = _CONTEXT.Process(target=_rank, args=(theirs, function, args, rank, world, store), daemon=True)
                process.start()
                theirs.close()
                ends.append(ours)
                processes.append(process)
            outcomes = [self._receive(end, rank) for rank, end in enumerate(ends)]
            for process in processes:
                process.join()
        failures = [f"rank {rank}:\n{value}" for rank, (kind, value) in enumerate(outcomes) if kind == "error"]
        assert not failures, "\n".join(failures)
        return [value for _, value in outcomes]

    @staticmethod
    def _receive(end, rank: int) -> tuple[str, object]:
        try:
            return pickle.loads(end.recv_bytes())
        except EOFError:
            return "error", f"rank {rank} died without a word"


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def fake_world(world: int, rank: int) -> None:
    """Make this process `rank` of a world without other processes, whose collectives return at once.

    Call it in a pool of one; it replaces the process group of the pool.
    """
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.destroy_process_group()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
