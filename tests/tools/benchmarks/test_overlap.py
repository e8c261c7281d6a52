"""The imitated network: what it delays, what it hides, and the command's table."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megavl.parallel import collectives
from tests.pool import free_port
from tests.tools.test_benchmark import ROOT, cells

pytestmark = pytest.mark.usefixtures("tools")

LATENCY_S, BYTES_PER_S = 0.05, 1e6
# An all-reduce of this many bytes over two ranks sends as many: 0.1 s.
BYTES = 100_000


def messages(overlaps: bool) -> tuple[list[tuple[float, float]], float, float]:
    """Two all-reduces: the rank waits for the first at once, and does 0.1 s of other work during the second. Returns
    the time on the network and the time waited for each, how long it all took, and the sum of the second."""
    sys.path.insert(0, str(ROOT / "tools"))
    from benchmarks.slow_network import SlowNetwork

    x = torch.full((BYTES // 4,), dist.get_rank() + 1.0)
    with SlowNetwork(LATENCY_S, BYTES_PER_S) as network:
        network.overlaps = overlaps
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(x)
        work = dist.all_reduce(x, async_op=True)
        time.sleep(0.1)
        work.wait()
        took = time.perf_counter() - began
    assert dist.all_reduce is collectives.dist.all_reduce
    return [(each.takes_s, each.waited_s) for each in network.messages], took, x[0].item()


@pytest.mark.parametrize(("overlaps", "waited", "least_s"), [(True, 0.05, 0.3), (False, 0.15, 0.4)])
def test_a_message_behind_work_is_waited_for_less(pool, overlaps, waited, least_s):
    for found, took, total in pool.run(2, messages, overlaps):
        assert [takes for takes, _ in found] == pytest.approx([0.15, 0.15])
        assert found[0][1] == pytest.approx(0.15)
        assert found[1][1] <= waited if overlaps else found[1][1] == pytest.approx(waited)
        assert took >= least_s and total == 6


@pytest.mark.parametrize("words", [["--bucket", "300000"], ["parallel.tensor=2", "parallel.sequence=true"]], ids=str)
def test_the_command(words):
    torchrun = [str(Path(sys.executable).parent / "torchrun"), "--nproc-per-node", "2", "--master-port"]
    overrides = ["train.precision=bf16", "train.global_batch=2", "model.decoder.layers=4"]
    options = ["--steps", "1", "--warmup", "0", "--config", "launch/recipes/vl_debug.yaml"]
    done = subprocess.run(
        [*torchrun, str(free_port()), "tools/benchmark.py", "overlap", *options, *overrides, *words],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    overlapping, waiting = cells(done.stdout, "overlapping", "waiting")
    assert waiting[4] == "0%" and overlapping[2] == waiting[2] != "0.000"
    assert "waiting / overlapping, step time:" in done.stdout
