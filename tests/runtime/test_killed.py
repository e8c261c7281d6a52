"""A run whose ranks are killed in the middle of an epoch reads on, on other ranks, as if nothing had happened."""

import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from megavl.config.run import RunConfig, SourceConfig
from megavl.runtime.deepspeed.start import start_deepspeed
from megavl.runtime.env import Env
from megavl.runtime.loop import train
from megavl.runtime.metrics import Metrics
from tests.config.runs import make_run
from tests.data.conftest import MODEL, corpus
from tests.models import changed

__all__ = ["corpus"]

STEPS, KILLED_AFTER, GLOBAL_BATCH = 4, 3, 12


def config(corpus, folder: Path, workers: int, micro_batch: int) -> RunConfig:
    return make_run(
        output_dir=str(folder),
        # Three items in the model list: test_control cuts it in two.
        model=changed(MODEL, decoder={"layers": 1}),
        data=corpus.data(
            text=(SourceConfig(prefix=corpus.prefix("text"), weight=2), SourceConfig(prefix=corpus.prefix("more"))),
            workers=workers,
        ),
        train={"steps": STEPS, "global_batch": GLOBAL_BATCH, "micro_batch": micro_batch, "precision": "fp32"},
        checkpoint={"every": 2},
        log={"tensorboard": False},
    )


def run(config: RunConfig, killed_after: int | None) -> None:
    """Train as launch/pretrain.py does; each rank writes the keys of its samples, and is killed after so many steps."""
    # The pool's ranks are daemons, which may have no children; the loader's workers end with their rank by themselves.
    multiprocessing.current_process()._config["daemon"] = False
    start_deepspeed("gloo")
    env = Env(int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"]))
    record, keys = Metrics.record, Path(config.output_dir) / f"keys_{env.world}_{env.rank}.jsonl"

    def record_and_die(metrics, batch, *rest):
        tokens = [micro_batch.tokens.tolist() for micro_batch in batch.micro_batches]
        with open(keys, "a") as file:
            file.write(json.dumps([batch.step, sum(tokens, [])]) + "\n")
        record(metrics, batch, *rest)
        if batch.step + 1 == killed_after:
            os.kill(os.getpid(), signal.SIGKILL)

    Metrics.record = record_and_die
    train(config, env)


def samples(folder: Path, world: int) -> dict[int, list[int]]:
    """The tokens of each step's global batch, from what the ranks of a world wrote."""
    ranks = [
        dict(json.loads(line) for line in (folder / f"keys_{world}_{rank}.jsonl").read_text().splitlines())
        for rank in range(world)
    ]
    return {step: sum((rank[step] for rank in ranks), []) for step in ranks[0]}


def test_the_samples_and_losses_of_a_killed_run(pool, corpus, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    pool.run(3, run, config(corpus, whole, workers=0, micro_batch=4), None)
    with pytest.raises(AssertionError, match="rank 0 died without a word"):
        pool.run(2, run, config(corpus, killed, workers=0, micro_batch=3), KILLED_AFTER)
    pool.run(1, run, config(corpus, killed, workers=2, micro_batch=2), None)

    expected = samples(whole, 3)
    assert list(expected) == list(range(STEPS)) and len({tuple(tokens) for tokens in expected.values()}) == STEPS
    before, after = samples(killed, 2), samples(killed, 1)
    assert list(before) == list(range(KILLED_AFTER)) and list(after) == [2, 3]
    assert before == {step: expected[step] for step in before} and after == {step: expected[step] for step in after}

    losses = [
        {row["step"]: row["loss"] for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())}
        for folder in (whole, killed)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)  # measured 8.0e-8
    ledgers = [json.loads((folder / "data.json").read_text()) for folder in (whole, killed)]
    assert ledgers[0] == ledgers[1] and ledgers[0]["read"]["steps"] == STEPS
    assert all(entry["epochs"] % 1 for entry in ledgers[0]["read"]["entries"])
