"""Measure: the steps of a recipe, alone or beside transformers, a block's launches and memory, the data path, experts.

    python tools/benchmark.py step --config launch/recipes/vl_7b_stage2.yaml model.decoder.layers=4 \\
        parallel.tensor=1 parallel.pipeline=1 train.global_batch=4 train.micro_batch=1 [--vs "train.recompute=block"]

times training steps on made-up packs, under the same launchers as launch/pretrain.py. The settings that --vs adds take
turns with the first in the same processes, and the ratios of their speeds are those of each round.

    python tools/benchmark.py peer --config launch/recipes/vl_debug.yaml [data.tokenizer=FILE --dataset PREFIX]

times steps in one process beside transformers' model under DeepSpeed and under plain torch, with the same weights on
the same documents. There is no ratio if the losses differ.

    python tools/benchmark.py kernels [--presets vl_7b vl2_small] [--gpus hopper ampere] [--ops triton]

counts launches and bytes of a decoder block with the operators of a GPU, beside the least that they could be. It needs
no GPU; `--ops torch` leaves out the Triton kernels.

    python tools/benchmark.py memory [--presets vl_7b vl2_small] [--tokens 4096] [--tensor 1 8]

counts the bytes that autograd keeps of a block until its backward pass, under each kind of recomputation, and times
what recomputation costs. It needs no GPU.

    python tools/benchmark.py state --config launch/recipes/vl_debug.yaml

counts the bytes of weights, gradients and optimizer state for each parameter, and their peak in the optimizer's step,
under the same launchers as launch/pretrain.py.

    torchrun --nproc-per-node 2 tools/benchmark.py overlap --config launch/recipes/vl_debug.yaml train.precision=bf16

times steps over a network of given latency and bandwidth, which it imitates between processes on CPUs. Steps whose
messages overlap with computation and steps that wait for each message take turns.

    python tools/benchmark.py split

compares the bubbles of the recipes on the papers' numbers of GPUs with equal numbers of items on each stage and with
the automatic split, images encoded by the first stage and by all ranks.

    deepspeed --num_accelerators 8 tools/benchmark.py sleeping --config launch/recipes/vl_7b_stage2.yaml

times the steps of a pipeline of as many ranks as are started. Their passes sleep for as long as the plan of the recipe
says: stages of equal numbers of items beside balanced ones, and the places where images are encoded.

    python tools/benchmark.py data [--subjects text images loader packed] [--megatron PATH]

measures each part of the data path against the least that its work can cost.

    python tools/benchmark.py grouped [--presets vl2_tiny vl2_small vl2_base] [--tokens 4096]

times the products of routed experts by each implementation that the machine has, beside one product of all rows. The
results are tables in Markdown, for docs/benchmarks/; `--json FILE` writes those of all but the last two as one object.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

SUBJECTS = ("text", "images", "loader", "packed")
BATCHES = ("equal", "random", "sorted")
KINDS = ("text", "multimodal")
BLOCKS = ("vl_7b", "vl2_small")
GPUS = ("hopper", "ampere")
EXPERTS = ("vl2_tiny", "vl2_small", "vl2_base")


def at_least(least: int) -> Callable[[str], int]:
    """Reads a whole number of an option that has a least one."""

    def read(words: str) -> int:
        number = int(words)
        if number < least:
            raise argparse.ArgumentTypeError(f"{number} is less than {least}")
        return number

    read.__name__ = "int"  # argparse names it where the words are no number
    return read


def file_to_write(words: str) -> Path:
    """Its folder has to be there before anything is measured."""
    path = Path(words)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path.parent} is no folder, so the result could not be kept: create it")
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a folder, so the result could not be kept: name a file in it")
    return path


def operator_choice(words: str) -> tuple[str, str]:
    op, separator, name = words.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"{words!r} names no candidate: write OP=NAME, such as expert_mlp=torch")
    return op, name


def step_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmark.py step", description="tokens/s, MFU and memory of training steps")
    parser.add_argument("--config", required=True, metavar="RECIPE.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    parser.add_argument(
        "--images", type=at_least(0), default=3, help="images of each pack in a multimodal step (default 3)"
    )
    parser.add_argument("--documents", type=at_least(1), default=4, help="documents of each pack (default 4)")
    parser.add_argument("--grid", metavar="ROWSxCOLUMNS", help="local tiles of each image (default: the fewest)")
    parser.add_argument("--steps", type=at_least(1), default=5, help="timed steps of each kind (default 5)")
    parser.add_argument("--warmup", type=at_least(0), default=2, help="steps of each kind before them (default 2)")
    parser.add_argument(
        "--vs", action="append", default=[], metavar="'OVERRIDE OVERRIDE ...'", help="another setting (repeatable)"
    )
    parser.add_argument("--kind", action="append", choices=KINDS, help="kind of steps (repeatable; default: both)")
    parser.add_argument("--skew", action="store_true", help="choose routed experts unevenly")
    parser.add_argument("--pin", action="store_true", help="keep each rank on a processor core of its own")
    parser.add_argument("--json", type=file_to_write, metavar="FILE", help="also write the result as one JSON object")
    return parser


def peer_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmark.py peer", description="tokens/s beside transformers, one process")
    parser.add_argument("--config", required=True, metavar="RECIPE.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    parser.add_argument(
        "--dataset",
        metavar="PREFIX",
        help="text documents (default: the entries of Python's documentation)",
    )
    parser.add_argument(
        "--vocab", type=at_least(1), default=2048, help="pieces of that corpus's tokenizer (default 2048)"
    )
    parser.add_argument("--batches", nargs="+", choices=BATCHES, default=BATCHES, help="kinds of batches (all)")
    parser.add_argument(
        "--padded-batch", type=at_least(1), default=8, metavar="N", help="documents of a padded micro-batch (default 8)"
    )
    parser.add_argument(
        "--images", type=at_least(0), default=0, help="also compare steps with N images in each pack (0: no)"
    )
    parser.add_argument("--steps", type=at_least(1), default=5, help="timed steps of each kind of batches (default 5)")
    parser.add_argument(
        "--warmup", type=at_least(0), default=1, help="steps before them, after the compared one (default 1)"
    )
    parser.add_argument("--json", type=file_to_write, metavar="FILE", help="also write the result as one JSON object")
    return parser


def state_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmark.py state", description="bytes of a run's state a parameter")
    parser.add_argument("--config", required=True, metavar="RECIPE.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    parser.add_argument("--json", type=file_to_write, metavar="FILE", help="also write the result as one JSON object")
    return parser


def overlap_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmark.py overlap", description="steps over a slow network, on CPUs")
    parser.add_argument("--config", required=True, metavar="RECIPE.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    parser.add_argument("--latency-ms", type=float, default=1.0, help="of each message (default 1)")
    parser.add_argument("--gigabytes-per-s", type=float, default=0.1, help="that a rank sends (default 0.1)")
    parser.add_argument(
        "--bucket", type=at_least(1), metavar="N", help="elements from which on a bucket of gradients is closed"
    )
    parser.add_argument("--steps", type=at_least(1), default=5, help="timed steps of each kind (default 5)")
    parser.add_argument("--warmup", type=at_least(0), default=2, help="steps of each kind before them (default 2)")
    parser.add_argument("--json", type=file_to_write, metavar="FILE", help="also write the result as one JSON object")
    return parser


def split_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmark.py split", description="bubbles of the recipes")
    parser.add_argument("--json", type=file_to_write, metavar="FILE", help="also write the result as one JSON object")
    return parser


def sleeping_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmark.py sleeping", description="pipelines whose passes sleep")
    parser.add_argument("--config", required=True, metavar="RECIPE.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    parser.add_argument("--micro-batches", type=at_least(1), default=16, help="of a step (default 16)")
    parser.add_argument(
        "--stage-s", type=float, default=0.15, help="seconds of both passes of a mean stage in a text step (0.15)"
    )
    parser.add_argument("--steps", type=at_least(1), default=3, help="timed steps of each kind (default 3)")
    parser.add_argument("--json", type=file_to_write, metavar="FILE", help="also write the result as one JSON object")
    return parser


def kernels_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmark.py kernels", description="launches and bytes of a decoder block")
    parser.add_argument(
        "--presets", nargs="+", default=BLOCKS, help="models whose blocks to count (default: VL-7B, VL2-Small)"
    )
    parser.add_argument("--gpus", nargs="+", choices=GPUS, default=GPUS, help="whose operators to count (default: all)")
    parser.add_argument("--ops", choices=("triton", "torch"), default="triton", help="with Triton kernels, or without")
    parser.add_argument(
        "--choose",
        action="append",
        default=[],
        type=operator_choice,
        metavar="OP=NAME",
        help="a candidate of an operator, such as expert_mlp=torch (repeatable; default: the first that is available)",
    )
    parser.add_argument("--tokens", type=at_least(1), default=4096, help="of a micro-batch (default 4096)")
    parser.add_argument("--documents", type=at_least(1), default=4, help="documents that they are in (default 4)")
    parser.add_argument("--json", type=file_to_write, metavar="FILE", help="also write the result as one JSON object")
    return parser


def memory_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmark.py memory", description="bytes that autograd keeps of a block")
    parser.add_argument(
        "--presets", nargs="+", default=BLOCKS, help="models whose blocks to measure (default: VL-7B, VL2-Small)"
    )
    parser.add_argument(
        "--tokens", type=at_least(1), default=4096, help="of a micro-batch, in 4 documents (default 4096)"
    )
    parser.add_argument(
        "--tensor",
        type=at_least(1),
        nargs="+",
        default=(1, 8),
        help="tensor ranks, from 2 on with sequence parallelism (1 8)",
    )
    parser.add_argument("--timed-tokens", type=at_least(4), default=1024, help="where the cost is timed (default 1024)")
    parser.add_argument("--rounds", type=at_least(1), default=5, help="timed passes of each kind, in turn (default 5)")
    parser.add_argument("--json", type=file_to_write, metavar="FILE", help="also write the result as one JSON object")
    return parser


def data_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmark.py data", description="the data path, each part beside its bound")
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=SUBJECTS, help="what to measure (all)")
    parser.add_argument("--megabytes", type=float, default=64, help="text of the corpus (default 64); 8 make a shard")
    parser.add_argument("--images", type=int, default=1000, help="image files (default 1000)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one for each core)")
    parser.add_argument("--resume-at", type=int, default=100_000, help="step that a run goes on from (default 100,000)")
    parser.add_argument("--repetitions", type=int, default=3, help="of everything, in turn (default 3)")
    parser.add_argument("--megatron", type=Path, metavar="PATH", help="a checkout of Megatron-LM to compare with")
    parser.add_argument("--directory", type=Path, help="where the files go, some GB (default: a temporary one)")
    return parser


def grouped_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmark.py grouped", description="products of routed experts, TFLOP/s")
    parser.add_argument("--presets", nargs="+", default=EXPERTS, help="models whose shapes to take (default: VL2's)")
    parser.add_argument("--tokens", type=int, default=4096, help="of a micro-batch (default 4096)")
    parser.add_argument("--repetitions", type=int, default=3, help="of everything, in turn (default 3)")
    return parser


def main() -> None:
    # The deepspeed launcher puts its own argument before all others.
    match [word for word in sys.argv[1:] if not word.startswith("--local_rank")]:
        case ["step", *words]:
            from benchmarks import step

            step.run(step_parser().parse_intermixed_args(words))
        case ["peer", *words]:
            from benchmarks import peer

            peer.run(peer_parser().parse_intermixed_args(words))
        case ["state", *words]:
            from benchmarks import state

            state.run(state_parser().parse_intermixed_args(words))
        case ["overlap", *words]:
            from benchmarks import overlap

            overlap.run(overlap_parser().parse_intermixed_args(words))
        case ["split", *words]:
            from benchmarks import split

            split.run(split_parser().parse_args(words))
        case ["sleeping", *words]:
            from benchmarks import sleeping

            sleeping.run(sleeping_parser().parse_intermixed_args(words))
        case ["kernels", *words]:
            from benchmarks import kernels

            kernels.run(kernels_parser().parse_args(words))
        case ["memory", *words]:
            from benchmarks import memory

            memory.run(memory_parser().parse_args(words))
        case ["data", *words]:
            from benchmarks import data

            data.run(data_parser().parse_args(words))
        case ["grouped", *words]:
            from benchmarks import grouped

            grouped.run(grouped_parser().parse_args(words))
        case words:
            print(__doc__)
            sys.exit(0 if words in (["-h"], ["--help"]) else 2)


if __name__ == "__main__":
    main()
