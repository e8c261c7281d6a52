"""Whole runs over broken images: within the budget they go on, beyond it every rank ends with the same words."""

import json
from pathlib import Path

import pytest
import torch.distributed as dist

from megavl.config.run import RunConfig, SourceConfig
from megavl.data.encoded import EncodedDocument, EncodedImage
from megavl.data.tokenizer import load_tokenizer
from megavl.data.writer import StoreWriter
from megavl.parallel.agree import RunError
from megavl.runtime.deepspeed.start import start_deepspeed
from megavl.runtime.env import Env
from megavl.runtime.loop import train
from tests.data.conftest import encoded_text, image_bytes
from tests.models import changed
from tests.runtime.cases import MODEL, run_config


@pytest.fixture
def config(corpus, tmp_path) -> RunConfig:
    """Two packs a step on two data-parallel ranks, or on one that two tensor ranks make up. A document fills a pack: a
    good image, text, and a broken image."""
    image = EncodedImage(image_bytes(0, (50, 50)), 50, 50)
    broken = EncodedImage(image.data[:-500], 50, 50)
    with StoreWriter(str(tmp_path / "store"), load_tokenizer(corpus.tokenizer)) as writer:
        for key in ("one", "two"):
            writer.add(
                EncodedDocument(key, "file.jsonl", (image, encoded_text(*range(5, 35)), broken, encoded_text(2)))
            )
    source = SourceConfig(prefix=str(tmp_path / "store"))
    # Room for the corpus's vocabulary.
    model = changed(MODEL, decoder={"vocab_size": 480}, image_token_id=479)
    return changed(
        run_config(model=model, train={"steps": 3, "global_batch": 2}),
        output_dir=str(tmp_path / "run"),
        data={"tokenizer": corpus.tokenizer, "text": (), "multimodal": (source,), "text_ratio": 0, "workers": 0},
        checkpoint={"every": 1},
        log={"tensorboard": False},
    )


def run(config: RunConfig, budget: int, **parallel) -> str | None:
    """What this rank ends with, None where it trains to the last step."""
    rank = dist.get_rank()
    start_deepspeed("gloo")
    config = changed(config, data={"bad_images": budget}, parallel=parallel)
    try:
        train(config, Env(rank, rank, dist.get_world_size()))
    except RunError as error:
        return str(error)


def two_ranks(config: RunConfig, budget: int, axis: str, vision: str) -> str | None:
    return run(config, budget, **{axis: 2}, vision=vision)


def log_of(config: RunConfig) -> list[dict]:
    path = Path(config.output_dir) / "bad_images.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_data_parallel_ranks_count_together_and_a_resume_goes_on_counting(pool, config):
    first, second = pool.run(2, run, config, 3)
    log = log_of(config)
    assert first == second
    assert first.startswith("step 2 has images that cannot be decoded, 2 of them; the first: ")
    assert "With them there are 4 in this run, and data.bad_images allows 3" in first
    assert f"{config.data.multimodal[0].prefix}: document " in first and "bad_images.jsonl" in first
    assert [(row["step"], row["pack"], row["image"], row["sequence"] % 4) for row in log] == [
        (1, 0, 1, 2),
        (1, 1, 1, 2),
        (2, 0, 1, 2),
        (2, 1, 1, 2),
    ]
    assert {row["document"] for row in log} == {"one", "two"}
    # From the checkpoint of step 1, which knows of two: now two more are allowed, but not those of step 3.
    first, second = pool.run(2, run, config, 5)
    assert first == second
    assert first.startswith("step 3 has") and "there are 6 in this run" in first
    assert pool.run(2, run, config, 6) == [None, None]


@pytest.mark.parametrize(
    ("axis", "vision"),
    [
        ("tensor", "replicated"),
        ("tensor", "sharded"),
        ("tensor", "pipelined"),
        ("pipeline", "pipelined"),
        ("pipeline", "balanced"),
    ],
)
def test_ranks_of_a_replica_count_an_image_once(pool, config, axis, vision):
    """Each of two ranks has met it, or one of them."""
    assert pool.run(2, two_ranks, config, 6, axis, vision) == [None, None]
    log = log_of(config)
    assert [(row["step"], row["pack"]) for row in log] == [(step, pack) for step in (1, 2, 3) for pack in (0, 1)]


def test_without_a_budget_the_first_one_ends_the_run(pool, config):
    first, second = pool.run(2, run, config, 0)
    assert first == second and "data.bad_images allows 0" in first
    assert not list(Path(config.output_dir).glob("checkpoints/*"))
