"""What a run shows of its experts."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megavl.batch import StepBatch
from megavl.config.presets import PRESETS
from megavl.config.run import RunConfig
from megavl.parallel.agree import RunError
from megavl.runtime.balance import Load
from megavl.runtime.deepspeed.start import start_deepspeed
from megavl.runtime.env import Env
from megavl.runtime.loop import train
from megavl.runtime.metrics import Metrics
from tests.config.runs import make_run
from tests.runtime.test_killed import config as run_of

# Block 1 is balanced, block 2 uses three experts of eight alone.
LOAD = Load(
    layers=(1, 2),
    tokens=torch.tensor([[30] * 8, [80, 80, 80, 0, 0, 0, 0, 0]]),
    auxiliary=torch.tensor([1.0, 2.5], dtype=torch.float64),
    bias=torch.tensor([[0.0] * 8, [-0.002] * 3 + [0.001] * 5]),
)


def test_statistics_of_a_load():
    assert LOAD.max_over_mean.tolist() == pytest.approx([1, 8 / 3])
    assert LOAD.entropy.tolist() == pytest.approx([1, math.log(3) / math.log(8)])


def record(folder: str, loads: list[Load | None], preset: str) -> None:
    """One rank writes a step of each load."""
    config = make_run(output_dir=folder, model=PRESETS[preset], train={"steps": len(loads)})
    metrics = Metrics(config, Env(rank=0, local_rank=0, world=1), None)
    for step, load in enumerate(loads):
        metrics.record(
            StepBatch(step, "multimodal", (), 90, 100, 3, 7, 10_000),
            loss=5.0,
            grad_norm=1.0,
            lr=1e-3,
            step_s=2.0,
            load=load,
        )
    metrics.close()


def test_a_run_with_experts(pool, tmp_path):
    softmax = Load(LOAD.layers, LOAD.tokens, LOAD.auxiliary, bias=None)
    pool.run(1, record, str(tmp_path), [LOAD, softmax], "vl2_debug")
    first, second = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert (first["images"], first["tiles"]) == (3, 7)
    assert list(first["experts"]) == ["1", "2"]
    worst = first["experts"]["2"]
    assert worst.pop("entropy") == pytest.approx(math.log(3) / math.log(8))
    assert worst == {
        "max_over_mean": pytest.approx(8 / 3),
        "auxiliary": 2.5,
        "tokens": [80, 80, 80, 0, 0, 0, 0, 0],
        "bias_min": pytest.approx(-0.002),
        "bias_max": pytest.approx(0.001),
    }
    assert "bias_min" not in second["experts"]["1"]

    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.value for event in board.Scalars("experts_max_over_mean/block_02")] == pytest.approx([8 / 3] * 2)
    assert {event.step for event in board.Images("experts/load")} == {1, 2}
    assert (board.Images("experts/load")[0].width, board.Images("experts/load")[0].height) == (64, 16)


def test_a_run_without_experts(pool, tmp_path):
    pool.run(1, record, str(tmp_path), [None], "vl_debug")
    (row,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert "experts" not in row


def write_nowhere(folder: str) -> str:
    config = make_run(output_dir=folder)
    world = dist.get_world_size()
    try:
        Metrics(config, Env(dist.get_rank(), dist.get_rank(), world), dist.new_group())
    except RunError as error:
        return str(error)
    return "opened"


def test_a_folder_that_cannot_be_written_ends_all_ranks(pool, tmp_path):
    (tmp_path / "file").write_text("")
    first, second = pool.run(2, write_nowhere, str(tmp_path / "file"))
    assert first == second and "File exists" in first


def fail_to_write(config: RunConfig) -> str:
    """A run whose metrics cannot be written: what it ends with on this rank."""
    start_deepspeed("gloo")
    try:
        train(config, Env(dist.get_rank(), dist.get_rank(), dist.get_world_size()))
    except RunError as error:
        return str(error)
    return "trained"


def test_a_full_disk_ends_all_ranks_with_its_message(pool, corpus, tmp_path):
    """Closing the files fails as well, which must not hide the message."""
    config = run_of(corpus, tmp_path / "run", workers=0, micro_batch=2)
    Path(config.output_dir).mkdir()
    Path(config.output_dir, "metrics.jsonl").symlink_to("/dev/full")
    first, second = pool.run(2, fail_to_write, config)
    assert first == second and "No space left on device" in first
