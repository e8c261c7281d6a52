"""tools/benchmark.py: the tables have a row for each kind of step, for each part of the data path, and for each
implementation of experts' products."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megavl.config.error import ConfigError
from megavl.config.presets import PRESETS
from megavl.config.tiles import Tiling
from megavl.parallel.groups import Axis, Mesh, TensorAxis
from megavl.parallel.topology import Topology
from tests.config.runs import make_run
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
    options = ["--steps", "2", "--warmup", "1", "--images", "4", "--grid", "2x1"]
    overrides = ["parallel.pipeline=1", "model.decoder.layers=2", "train.global_batch=2"]
    done = subprocess.run(
        [
            *torchrun,
            str(free_port()),
            "tools/benchmark.py",
            "step",
            *options,
            "--config",
            "launch/recipes/vl2_debug.yaml",
            *overrides,
        ],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^\| text \| 0 \| 0 \| [\d,]+ \| \d", done.stdout, re.MULTILINE), done.stdout
    assert re.search(r"^optimizer: torch AdamW, fused \(", done.stdout, re.MULTILINE), done.stdout
    assert re.search(r"^\| multimodal \| 8 \| 24 \| [\d,]+ \| \d", done.stdout, re.MULTILINE), done.stdout


@pytest.mark.parametrize(("preset", "grid", "tiles"), [("vl_debug", None, 3), ("vl2_debug", "2x2", 15)])
def test_images_of_a_made_up_pack_have_their_places(preset, grid, tiles, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    from benchmarks.packs import grid_of, made_up_pack

    config = make_run(model=PRESETS[preset], data={"seq_len": 500})
    grid, tiling = grid_of(config, grid), Tiling(config.model)
    pack = made_up_pack(config, 3, grid, Mesh(Topology(1, 1, 1), Axis(), Axis(), TensorAxis(), Axis(), Axis(), Axis()))
    assert (pack.tokens == config.model.image_token_id).sum() == 3 * tiling.tokens[tiling.grids.index(grid)]
    assert pack.grids == (grid,) * 3
    assert all(len(pixels) == tiles for pixels in pack.pixels.values())
    with pytest.raises(ConfigError, match="--grid 7x7 is none of"):
        grid_of(config, "7x7")


@pytest.mark.long
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
