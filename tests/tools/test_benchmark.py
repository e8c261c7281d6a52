"""tools/benchmark.py on two CPU ranks: the table has a row for each kind of step."""

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.pool import free_port

ROOT = Path(__file__).parents[2]


def test_a_step_of_each_kind_is_timed():
    torchrun = [str(Path(sys.executable).parent / "torchrun"), "--nproc-per-node", "2", "--master-port"]
    options = ["--steps", "2", "--warmup", "1", "--images", "4"]
    overrides = ["parallel.pipeline=2", "model.decoder.layers=2", "train.global_batch=2"]
    done = subprocess.run(
        [
            *torchrun,
            str(free_port()),
            "tools/benchmark.py",
            *options,
            "--config",
            "launch/recipes/vl_debug.yaml",
            *overrides,
        ],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^\| text \| 0 \| [\d,]+ \| \d", done.stdout, re.MULTILINE), done.stdout
    assert re.search(r"^\| multimodal \| 8 \| [\d,]+ \| \d", done.stdout, re.MULTILINE), done.stdout
