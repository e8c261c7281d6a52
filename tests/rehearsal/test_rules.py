"""What cannot be executed is refused with a reason, before anything is imported."""

import subprocess
import sys

import pytest

from megavl.config.error import ConfigError
from megavl.rehearsal.rules import check_rank
from tests.config.runs import make_run


@pytest.mark.parametrize("rank", [-1, 4])
def test_ranks_outside_of_the_world(rank):
    with pytest.raises(ConfigError, match=f"4 ranks have no rank {rank}: choose one from 0 to 3"):
        check_rank(make_run(), 4, rank)


def test_every_reason_is_given():
    config = make_run(parallel={"zero": 2}, train={"compile": True})
    with pytest.raises(ConfigError, match=r"(?s)parallel.zero = 2: .*parallel.zero=1.*train.compile=false"):
        check_rank(config, 2, 0)


def test_what_runs_passes():
    for rank in (0, 3):
        check_rank(make_run(parallel={"zero": 1}), 4, rank)


def test_torch_is_not_imported():
    program = "import megavl.rehearsal.rules, sys; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
