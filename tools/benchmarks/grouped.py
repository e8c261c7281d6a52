"""Products of routed experts: each implementation beside one product of all rows, which is the same arithmetic."""

import argparse
import sys
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial

import torch
import torch.nn.functional as F
from benchmarks.measure import Row, Timing, command_line, interleave, processor, table, wall_s
from torch import Tensor

from megavl import __version__
from megavl.config.presets import PRESETS
from megavl.ops.dispatch import Ops, choose
from megavl.ops.grouped import GroupedLinear, Groups, reference_grouped_linear

_LOOP, _KERNEL, _BOUND = "one expert at a time", "the kernel that training uses", "one product of all rows"
# Products of one timing: a GPU does each in less time than its clock is read in.
_PRODUCTS = {"cpu": 1, "cuda": 50}


def run(args: argparse.Namespace) -> None:
    """Print the tables that the command line asks for."""
    routed = [name for name, config in PRESETS.items() if config.decoder.moe is not None]
    if unknown := set(args.presets) - set(routed):
        sys.exit(f"error: no routed experts in {', '.join(sorted(unknown))}: choose of {', '.join(routed)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ops = choose(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    print(f"{date.today()}, {name}, megavl {__version__}, torch {torch.__version__}: `{command_line()}`")
    print(*ops.lines[-2:], sep="\n")
    with ops.products:
        for preset in args.presets:
            print(f"\n{section(preset, args.tokens, args.repetitions, ops, device)}", flush=True)


def section(preset: str, tokens: int, repetitions: int, ops: Ops, device: torch.device) -> str:
    """The section of a preset in Markdown: gate products of a layer, bf16."""
    decoder = PRESETS[preset].decoder
    moe, rows = decoder.moe, tokens * decoder.moe.per_token
    backends = {_LOOP: reference_grouped_linear}
    if ops.grouped_linear is not reference_grouped_linear:
        backends[_KERNEL] = ops.grouped_linear
    draw = partial(torch.randn, device=device, dtype=torch.bfloat16)
    x = draw(rows, decoder.width).requires_grad_()
    stack = draw(moe.experts, moe.width, decoder.width).requires_grad_()
    matrix = draw(moe.width, decoder.width).requires_grad_()
    upstream = draw(rows, moe.width)
    flops = 2 * rows * decoder.width * moe.width
    lines = []
    for load, counts in loads(rows, moe.experts):
        for what, with_gradients, amount in (("forward", False, flops), ("forward and backward", True, 3 * flops)):
            works = {
                name: work(partial(grouped, backend, counts.to(device)), x, stack, upstream, with_gradients)
                for name, backend in backends.items()
            }
            works[_BOUND] = work(F.linear, x, matrix, upstream, with_gradients)
            times = _PRODUCTS[device.type]
            timings = interleave(
                repetitions, {name: (times * amount, partial(seconds, one, times)) for name, one in works.items()}
            )
            lines += [Row(f"{load}, {what}: {name}", timings[name], _BOUND, timings[_BOUND], "") for name in backends]
    return "\n".join(
        (
            f"### {preset}: {tokens:,} tokens, {moe.per_token} of {moe.experts} experts, "
            f"{decoder.width} to {moe.width} channels",
            "",
            *table(lines, "TFLOP/s", teraflops),
        )
    )


def loads(rows: int, experts: int) -> Iterator[tuple[str, Tensor]]:
    """Rows of each expert: as many for all, and as an untrained router may share them out, some with none."""
    yield (
        "even load",
        torch.full((experts,), rows // experts).index_add_(
            0, torch.arange(rows % experts), torch.ones(rows % experts, dtype=torch.int64)
        ),
    )
    busy = 1 / torch.arange(1, experts // 2 + 1)
    chosen = busy.multinomial(rows, replacement=True, generator=torch.Generator().manual_seed(0))
    yield "half of the experts idle", chosen.bincount(minlength=experts)


def grouped(backend: GroupedLinear, counts: Tensor, x: Tensor, stack: Tensor) -> Tensor:
    return backend(x, stack, Groups(counts))


def work(
    product: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor, upstream: Tensor, with_gradients: bool
) -> Callable[[], None]:
    """One product, and the gradients of both its factors."""

    def once() -> None:
        with torch.set_grad_enabled(with_gradients):
            y = product(x, weight)
        if with_gradients:
            torch.autograd.grad(y, (x, weight), upstream)

    return once


def seconds(once: Callable[[], None], times: int) -> float:
    """Of `times` products one after another, after one that is not counted."""

    def all_of_them() -> None:
        for _ in range(times):
            once()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    once()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return wall_s(all_of_them)


def teraflops(timing: Timing) -> str:
    return f"{timing.rate / 1e12:.3g}"
