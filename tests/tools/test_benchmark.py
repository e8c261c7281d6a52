"""tools/benchmark.py: the tables have a row for each kind of step, for each part of the data path, and for each
implementation of experts' products."""

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.pool import free_port

ROOT = Path(__file__).parents[2]
TEXT_ROWS = [
    "preprocess_data without gigatoken",
    "preprocess_data with gigatoken",
    "preprocess_data with gigatoken",
    "gigatoken in a loop",
]


def test_a_step_of_each_kind_is_timed():
    torchrun = [str(Path(sys.executable).parent / "torchrun"), "--nproc-per-node", "2", "--master-port"]
    options = ["--steps", "2", "--warmup", "1", "--images", "4"]
    overrides = ["parallel.pipeline=2", "model.decoder.layers=2", "train.global_batch=2"]
    done = subprocess.run(
        [
            *torchrun,
            str(free_port()),
            "tools/benchmark.py",
            "step",
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


def test_each_part_of_the_data_path_is_measured(tmp_path):
    options = {"images": 12, "megabytes": 1, "repetitions": 1, "workers": 1, "resume-at": 150, "directory": tmp_path}
    done = subprocess.run(
        [sys.executable, "tools/benchmark.py", "data", *(f"--{name}={value}" for name, value in options.items())],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # The command is done sooner than it starts, as far as the clock can tell, with so little to do.
    rows = re.findall(r"^\| ([^|]+) \| -?[\d.,]+ \| [^|]+ \| -?[\d.,]+ \| -?[\d.]+ \(", done.stdout, re.MULTILINE)
    assert rows == [
        *TEXT_ROWS,
        *TEXT_ROWS,
        "preprocess_data",
        "preprocess_data",
        "its writer alone, in one process",
        "vl_1b: the loader",
        "vl_7b: the loader",
        "documents at random",
        "packs of 4096 tokens, step after step",
        "first batch",
        "resume at step 150",
        "resume at step 150",
    ], done.stdout


def test_products_of_experts_are_measured():
    done = subprocess.run(
        [sys.executable, "tools/benchmark.py", "grouped", "--presets", "vl2_debug", "--tokens=64", "--repetitions=1"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = re.findall(r"^\| ([^|]+) \| [\d.e-]+ \| one product of all rows \| [\d.e-]+ \|", done.stdout, re.MULTILINE)
    assert rows == [
        f"{load}, {what}: one expert at a time"
        for load in ("even load", "half of the experts idle")
        for what in ("forward", "forward and backward")
    ], done.stdout
