"""megavl beside what a user would take instead: transformers under DeepSpeed (ZeRO-1), and under plain torch."""

import argparse
import gc
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from benchmarks import trainers
from benchmarks.agreement import Disagreement, check_losses
from benchmarks.clock import Read, Spent, clock_of
from benchmarks.mixed import made_corpus, mixed_steps, text_data
from benchmarks.one_process import load_one_process
from benchmarks.padded import documents_of, padded_batches, padding_share
from benchmarks.paired import Ratio, paired_ratio, take_turns
from benchmarks.record import circumstances, heading, write_json
from benchmarks.trainers import Trainer
from benchmarks.transformers_model import build, copy_weights, inputs_of
from torch import Tensor

from megavl.batch import StepBatch
from megavl.config.error import ConfigError
from megavl.config.run import DataConfig, RunConfig
from megavl.data.errors import DataError
from megavl.parallel.agree import RunError
from megavl.rehearsal.packs import grid_of, made_up_step
from megavl.runtime.env import Env, process_group, read_env
from megavl.runtime.mesh import mesh_of
from megavl.runtime.replica import build_replica

# Kinds of batches by the word of the command line, as the table names them.
_NAMES = {
    "equal": "equal full batches",
    "random": "mixed documents, random order",
    "sorted": "mixed documents, sorted by length",
    "images": "equal full batches with images",
}


@dataclass(frozen=True)
class Feed:
    """One step: the batch of megavl, and the same documents in micro-batches of transformers."""

    batch: StepBatch
    theirs: Sequence[dict[str, Tensor]]

    @property
    def tokens(self) -> int:
        """Tokens of the documents, without padding."""
        return sum(int(inputs["attention_mask"].sum()) for inputs in self.theirs)


@dataclass(frozen=True)
class Turn:
    """One step of one trainer."""

    spent: Spent
    loss: float


def run(args: argparse.Namespace) -> None:
    """Print the comparison that the command line asks for."""
    env = read_env()
    if env.world != 1:
        sys.exit(f"error: {env.world} ranks were started: this comparison is of one process; start it without launcher")
    try:
        config = load_one_process(args.config, *args.overrides)
        if config.model.family != "vl":
            raise ConfigError("this benchmark", [f"transformers has no model of the family of {config.model.name}"])
    except ConfigError as error:
        sys.exit(f"error: {error}")
    try:
        with tempfile.TemporaryDirectory() as directory, process_group(env, timeout=timedelta(minutes=10)):
            found = benchmark(config, env, args, Path(directory))
    except (Disagreement, DataError, ImportError, RunError, ValueError) as error:
        sys.exit(f"error: {error}")
    print("\n".join(page(found)))
    if args.json:
        write_json(args.json, found)


def benchmark(config: RunConfig, env: Env, args: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Measure every kind of batches.

    Args:
        directory: where a corpus goes if the command line names no dataset

    Raises:
        Disagreement: the losses differ.
    """
    rounds = 1 + args.warmup + args.steps
    found = {
        **circumstances(env.device),
        "model": config.model.name,
        "parameters": None,
        "precision": config.train.precision,
        "seq_len": config.data.seq_len,
        "micro_batches": config.train.micro_batches(dp=1),
        "padded_batch": args.padded_batch,
        "loss_differences": {},
        "rows": [],
    }
    for kind in [*args.batches, *(["images"] if args.images else [])]:
        name, feeds = _NAMES[kind], feeds_of(kind, config, env, args, rounds, directory)
        sides, found["parameters"] = build_trainers(config, env)
        turns, differences = compare(sides, feeds, config.train.precision, clock_of(env.device))
        found["loss_differences"][name] = differences
        found["rows"] += rows(name, feeds[-args.steps :], {side: each[-args.steps :] for side, each in turns.items()})
        del sides
        gc.collect()
    return found


def feeds_of(
    kind: str, config: RunConfig, env: Env, args: argparse.Namespace, rounds: int, directory: Path
) -> list[Feed]:
    """The steps of one kind of batches, in memory."""
    if kind in ("equal", "images"):
        return equal_feeds(config, env, rounds, args.images if kind == "images" else 0)
    steps = mixed_steps(config, _data(config, args, directory), rounds)
    return [mixed_feed(step, args.padded_batch, by_length=kind == "sorted") for step in steps]


def _data(config: RunConfig, args: argparse.Namespace, directory: Path) -> DataConfig:
    if args.dataset:
        return text_data(args.dataset, config.data.tokenizer, config.data.seq_len)
    return made_corpus(directory, config.data.seq_len, args.vocab)


def equal_feeds(config: RunConfig, env: Env, rounds: int, images: int) -> list[Feed]:
    """The same step over and over, of packs that are one document each, so that both sides do the same work."""
    mesh, kind = mesh_of(config, 1, env.device), "multimodal" if images else "text"
    batch = made_up_step(config, mesh, kind, images, grid_of(config, None), documents=1)
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    theirs = [inputs_of(pack.to(env.device), config.model, dtype) for pack in batch.micro_batches]
    return [Feed(batch, theirs)] * rounds


def mixed_feed(batch: StepBatch, size: int, by_length: bool) -> Feed:
    """A step of documents of mixed lengths: packed for megavl, padded for the others, `size` in each micro-batch."""
    return Feed(batch, padded_batches(documents_of(batch), size, by_length, seed=batch.step))


def build_trainers(config: RunConfig, env: Env) -> tuple[dict[str, Trainer], int]:
    """All trainers by name, with the same weights, and the number of parameters of the model."""
    replica = build_replica(config, mesh_of(config, 1, env.device), env)
    (stage,) = replica.stages
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    named = list(stage.vlm.named_parameters())
    models = [build(config.model, dtype, env.device) for _ in range(2)]
    for model in models:
        copy_weights(named, model, config.model)
    sides = {
        trainers.MEGAVL: trainers.Megavl(replica),
        trainers.DEEPSPEED: trainers.DeepSpeed(models[0], config),
        trainers.TORCH: trainers.Torch(models[1], config),
    }
    return sides, sum(parameter.numel() for _, parameter in named)


def compare(
    sides: dict[str, Trainer], feeds: Sequence[Feed], precision: str, read: Read
) -> tuple[dict[str, list[Turn]], list[float]]:
    """Take all steps of all trainers in turn, and compare the losses of each step before the next.

    Returns:
        Turns of each trainer, and the largest relative difference of the losses of each step.

    Raises:
        Disagreement: the losses of a step differ by more than rounding.
    """
    turns: dict[str, list[Turn]] = {name: [] for name in sides}
    differences = []
    for number, feed in enumerate(feeds):
        found = take_turns(1, {name: _turn(trainer, feed, read) for name, trainer in sides.items()})
        differences.append(check_losses(number, {name: turn.loss for name, (turn,) in found.items()}, precision))
        for name, (turn,) in found.items():
            turns[name].append(turn)
    return turns, differences


def _turn(trainer: Trainer, feed: Feed, read: Read) -> Callable[[int], Turn]:
    def work(_: int) -> Turn:
        started = read()
        loss = trainer.step(feed.batch, feed.theirs)
        return Turn(read() - started, loss)

    return work


def rows(name: str, feeds: Sequence[Feed], turns: dict[str, list[Turn]]) -> list[dict[str, Any]]:
    """What each trainer did with one kind of batches; the ratios are megavl's tokens a second over the trainer's."""
    tokens = [feed.tokens for feed in feeds]
    padding = {side: statistics.mean(padding_share(feed.theirs) for feed in feeds) for side in turns}
    padding[trainers.MEGAVL] = statistics.mean(
        1 - feed.tokens / sum(len(pack.tokens) for pack in feed.batch.micro_batches) for feed in feeds
    )
    found = []
    for side, each in turns.items():
        speed = {clock: _speed(tokens, each, clock) for clock in ("wall_s", "cpu_s")}
        ours = {clock: _speed(tokens, turns[trainers.MEGAVL], clock) for clock in speed}
        ratios = {clock: paired_ratio(ours[clock], speed[clock]) for clock in speed}
        found.append(
            {
                "batches": name,
                "trainer": side,
                "padding": padding[side],
                "tokens_a_step": statistics.mean(tokens),
                "tokens_per_s": statistics.median(speed["wall_s"]),
                "wall_s": statistics.median(turn.spent.wall_s for turn in each),
                "cpu_s": statistics.median(turn.spent.cpu_s for turn in each),
                "last_loss": each[-1].loss,
                "ours_over_theirs": {clock: ratio and asdict(ratio) for clock, ratio in ratios.items()},
                "rounds": [asdict(turn.spent) for turn in each],
            }
        )
    return found


def _speed(tokens: Sequence[int], turns: Sequence[Turn], clock: str) -> list[float]:
    """Tokens a second of each step; 0 where the clock has not moved."""
    seconds = [getattr(turn.spent, clock) for turn in turns]
    return [count / each if each else 0.0 for count, each in zip(tokens, seconds, strict=True)]


def page(found: dict[str, Any]) -> list[str]:
    """The result in Markdown."""
    return [
        heading(found),
        f"{found['model']}, {found['parameters'] / 1e6:.4g} M parameters, {found['precision']}, "
        f"{found['micro_batches']} micro-batches of {found['seq_len']} tokens, or of {found['padded_batch']} padded "
        "documents. Tokens are those of the documents, "
        "without padding; ratios are ours over theirs, above 1 where megavl is faster: median (lowest to highest)",
        *(
            f"{batches}: losses differ by at most {differences[0]:.1e} in the first step, from equal weights, and by "
            f"{max(differences):.1e} in any of {len(differences)} (relative)"
            for batches, differences in found["loss_differences"].items()
        ),
        "",
        "| batches | trainer | padding | tokens/s | wall, s | CPU, s | ours / theirs, wall | by CPU | last loss |",
        "|---|---|---|---|---|---|---|---|---|",
        *(
            f"| {row['batches']} | {row['trainer']} | {row['padding']:.1%} | {row['tokens_per_s']:,.0f} | "
            f"{row['wall_s']:.3f} | {row['cpu_s']:.3f} | "
            + " | ".join(str(Ratio(**ratio)) if ratio else "" for ratio in row["ours_over_theirs"].values())
            + f" | {row['last_loss']:.4f} |"
            for row in found["rows"]
        ),
    ]
