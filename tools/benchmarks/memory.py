"""Bytes that autograd keeps of one block from its forward to its backward pass, under each kind of recomputation.

The tensors are fake: shapes and dtypes without memory, so every preset runs at full width, with the operators of a GPU.
The output of a block is the input of the next one, so it counts here and the input does not. The cost of recomputation
is timed on real tensors in fp32, with the operators of this machine and a quarter of every width.
"""

import argparse
import gc
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from benchmarks.blocks import kinds_of_blocks
from benchmarks.clock import clock_of
from benchmarks.flat import lay_flat
from benchmarks.paired import Ratio, paired_ratio, take_turns
from benchmarks.record import circumstances, heading, write_json
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from megavl.config.model import DecoderConfig, ModelConfig
from megavl.config.presets import PRESETS
from megavl.model.block import Block
from megavl.model.layout import PackLayout
from megavl.model.run_block import call_block
from megavl.model.sam import SamBlock
from megavl.model.siglip import SiglipBlock
from megavl.ops.dispatch import Ops, choose
from megavl.ops.rope import rotary_tables
from megavl.parallel.groups import ExpertAxis, TensorAxis
from megavl.rehearsal.gpus import GPUS, gpu_ops
from megavl.rehearsal.storages import Storages
from megavl.runtime.recompute import recomputing
from megavl.runtime.selective import Selective

MODES = ("off", "selective", "block")
_DOCUMENTS = 4


def run(args: argparse.Namespace) -> None:
    """Print the tables that the command line asks for."""
    if unknown := set(args.presets) - set(PRESETS):
        sys.exit(f"error: no preset {', '.join(sorted(unknown))}: choose from {', '.join(PRESETS)}")
    options = {"--tokens": args.tokens, "--timed-tokens": args.timed_tokens}
    if uneven := [f"{option} {tokens}" for option, tokens in options.items() if tokens % _DOCUMENTS]:
        sys.exit(f"error: {', '.join(uneven)}: not divisible into {_DOCUMENTS} equal documents; choose a multiple")
    if uneven := [str(size) for size in args.tensor if args.tokens % size]:
        sys.exit(f"error: --tokens {args.tokens} is not divisible by --tensor {', '.join(uneven)}; choose a multiple")
    models = [PRESETS[preset] for preset in args.presets]
    try:
        kept = [row for tensor in args.tensor for model in models for row in kept_rows(model, args.tokens, tensor)]
    except ValueError as error:  # heads or widths of a model are not divisible by --tensor
        sys.exit(f"error: {error}: choose another --tensor")
    found = {
        **circumstances(torch.device("cpu")),
        "tokens": args.tokens,
        "kept": kept,
        "towers": [row for model in models for row in tower_rows(model)],
        "timed_tokens": args.timed_tokens,
        "cost": [row for model in models for row in cost_rows(model, args.timed_tokens, args.rounds)],
    }
    print("\n".join(page(found)))
    if args.json:
        write_json(args.json, found)


def kept_bytes(forward: Callable[[Tensor], Tensor], *shape: int) -> int:
    """Bytes that are in use after forward(x), its output included; x: bf16 of `shape`, requiring a gradient."""
    x = torch.empty(shape, requires_grad=True)
    with Storages() as storages:
        out = forward(x.view_as(x))
    gc.collect()
    kept = storages.bytes
    del out
    return kept


@contextmanager
def _fake_gpu() -> Iterator[Ops]:
    """Fake tensors, bf16 by default, and the operators of a GPU. Kernels of Triton are not launched."""
    from megavl.rehearsal.triton_launches import noted_launches

    ops = gpu_ops(GPUS["hopper"], triton=True, wanted=[("expert_mlp", "torch")])
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with FakeTensorMode(), ops.products, noted_launches(lambda tensors: None):
            yield ops
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _tensor_axis(size: int) -> Iterator[TensorAxis]:
    """An axis with sequence parallelism, whose collectives return at once; of size 1 without."""
    if size == 1:
        yield TensorAxis()
        return
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        yield TensorAxis(0, size, dist.group.WORLD, sequence=True)
    finally:
        dist.destroy_process_group()


def block_forward(
    decoder: DecoderConfig, layer: int, tokens: int, mode: str, ops: Ops, tp: TensorAxis
) -> Callable[[Tensor], Tensor]:
    """h -> output of decoder block `layer` under a mode of `train.recompute`; four documents of `tokens` in all."""
    selective = Selective()
    run_block = {"off": call_block, "selective": selective.run_block, "block": recomputing(ops.products)}[mode]
    if mode == "selective":
        ops, tp = selective.ops(ops), selective.tensor_axis(tp)
    block = Block(decoder, layer, tp, ExpertAxis(), ops)
    lay_flat(block)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    width = decoder.head_width if decoder.mla is None else decoder.mla.rope_width
    cos, sin = rotary_tables(torch.arange(tokens), width, decoder.rope_theta)
    length = tokens // _DOCUMENTS
    cu_seqlens = torch.arange(_DOCUMENTS + 1, dtype=torch.int32) * length
    layout = PackLayout(cu_seqlens, (length,) * _DOCUMENTS, 1, cos, sin)
    return lambda h: run_block(block, h, layout)


def kept_rows(model: ModelConfig, tokens: int, tensor: int) -> Iterator[dict[str, Any]]:
    """Bytes of a decoder block of each kind on one of `tensor` ranks, in JSON types."""
    decoder = model.decoder
    for kind, layer in kinds_of_blocks(decoder).items():
        row = {"model": model.name, "kind": kind, "tensor": tensor, "bytes": {}}
        for mode in MODES:
            with _tensor_axis(tensor) as tp, _fake_gpu() as ops:
                forward = block_forward(decoder, layer, tokens, mode, ops, tp)
                row["bytes"][mode] = kept_bytes(forward, tokens // tensor, decoder.width)
        yield row


def tower_rows(model: ModelConfig) -> Iterator[dict[str, Any]]:
    """Bytes of a block of each tower for one image or tile, in JSON types."""
    siglip, sam = model.siglip, model.sam
    blocks = {"SigLIP": (partial(SiglipBlock, siglip), (1, siglip.grid**2, siglip.width))}
    if sam is not None:
        shape = (1, sam.grid, sam.grid, sam.width)
        blocks["SAM, window"] = partial(SamBlock, sam, sam.window), shape
        blocks["SAM, global"] = partial(SamBlock, sam, 0), shape
    for name, (build, shape) in blocks.items():
        with _fake_gpu() as ops:
            off, block = (
                kept_bytes(partial(run_block, build()), *shape) for run_block in (call_block, recomputing(ops.products))
            )
        yield {"model": model.name, "block": name, "bytes": {"off": off, "block": block}}


def narrow(decoder: DecoderConfig) -> DecoderConfig:
    """A quarter of the heads and of the widths."""
    moe = decoder.moe and decoder.moe.model_copy(update={"width": decoder.moe.width // 4})
    quarter = {name: getattr(decoder, name) // 4 for name in ("width", "heads", "kv_heads", "mlp_width")}
    return decoder.model_copy(update={"moe": moe, **quarter})


def cost_rows(model: ModelConfig, tokens: int, rounds: int) -> Iterator[dict[str, Any]]:
    """CPU time of forward and backward of a decoder block of each kind, relative to "off", in JSON types."""
    decoder, ops, read = narrow(model.decoder), choose(torch.device("cpu")), clock_of(torch.device("cpu"))

    def work(forward: Callable[[Tensor], Tensor], h: Tensor) -> float:
        before = read()
        forward(h).backward(h.detach())
        return (read() - before).cpu_s

    for kind, layer in kinds_of_blocks(decoder).items():
        h = torch.randn(tokens, decoder.width, requires_grad=True)
        works = {}
        for mode in MODES:
            forward = block_forward(decoder, layer, tokens, mode, ops, TensorAxis())
            works[mode] = lambda _, forward=forward, h=h: work(forward, h)
        take_turns(1, works)
        times = take_turns(rounds, works)
        yield {
            "model": model.name,
            "kind": kind,
            "cpu_s": {mode: statistics.median(times[mode]) for mode in MODES},
            "relative": {mode: _json(paired_ratio(times[mode], times["off"])) for mode in MODES},
        }


def _json(ratio: Ratio) -> list[float]:
    return [ratio.median, ratio.lowest, ratio.highest]


def page(found: dict[str, Any]) -> Iterator[str]:
    """The result in Markdown."""
    yield heading(found)
    yield f"Kept of one block for {found['tokens']} tokens, bf16, fake tensors. The ratios are to `off`."
    yield ""
    yield "| block | tensor | off, MB | selective, MB | block, MB |"
    yield "|---|---|---|---|---|"
    for row in found["kept"]:
        tensor = "1" if row["tensor"] == 1 else f"{row['tensor']}, sequence"
        yield f"| {row['model']}, {row['kind']} | {tensor} | {_cells(row['bytes'])} |"
    yield ""
    yield "| block of a tower, 1 image or tile | off, MB | recomputed, MB |"
    yield "|---|---|---|"
    for row in found["towers"]:
        yield f"| {row['model']}, {row['block']} | {_cells(row['bytes'])} |"
    yield ""
    yield (
        f"CPU time of forward and backward for {found['timed_tokens']} tokens, fp32, a quarter of every width. The "
        "ratios are to `off`: median, lowest and highest."
    )
    yield ""
    yield "| block | off, s | selective | block |"
    yield "|---|---|---|---|"
    for row in found["cost"]:
        ratios = (Ratio(*row["relative"][mode]) for mode in MODES[1:])
        yield f"| {row['model']}, {row['kind']} | {row['cpu_s']['off']:.2f} | {' | '.join(map(str, ratios))} |"


def _cells(sizes: dict[str, int]) -> str:
    off, *others = sizes.values()
    return " | ".join((f"{off / 1e6:,.0f}", *(f"{size / 1e6:,.0f} ({size / off:.2f})" for size in others)))
