"""Launches and bytes of a decoder block with the operators of a GPU, beside the least that its operators need.

The tensors are fake: shapes and dtypes without memory, so every preset runs at full width and nothing is computed.
Collectives, the sums of gradients in DeepSpeed's engine, and the optimizer are not part of a block.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from benchmarks.attribution import REST, Attribution, Products
from benchmarks.blocks import kinds_of_blocks
from benchmarks.bound import Work, backward_bound, forward_bound, residual_bound
from benchmarks.flat import lay_flat, name_of
from benchmarks.record import circumstances, heading, write_json
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megavl.config.model import DecoderConfig, ModelConfig
from megavl.config.presets import PRESETS
from megavl.model.block import Block
from megavl.model.layout import PackLayout
from megavl.ops.candidates import CANDIDATES
from megavl.ops.dispatch import Ops, OpsError
from megavl.ops.rope import rotary_tables
from megavl.parallel.groups import ExpertAxis, TensorAxis
from megavl.rehearsal.gpus import GPUS, Gpu, gpu_kernels, gpu_ops
from megavl.rehearsal.launches import distinct_bytes, launches_kernel

FORWARD, BACKWARD = "forward", "backward"


def run(args: argparse.Namespace) -> None:
    """Print the tables that the command line asks for."""
    if unknown := set(args.presets) - set(PRESETS):
        sys.exit(f"error: no preset {', '.join(sorted(unknown))}: choose from {', '.join(PRESETS)}")
    if args.tokens % args.documents:
        sys.exit(f"error: --tokens {args.tokens} is not divisible by --documents {args.documents}")
    if args.ops == "torch" and "ampere" in args.gpus and any(PRESETS[name].decoder.moe for name in args.presets):
        sys.exit(
            "error: without Triton an Ampere GPU multiplies one expert at a time, by row counts that fake tensors "
            "do not have: choose --gpus hopper"
        )
    if args.ops == "triton" and not find_spec("triton"):
        sys.exit("error: Triton is not installed, so its kernels cannot be counted: pip install triton, or --ops torch")
    for op, name in args.choose:
        if op not in CANDIDATES:
            sys.exit(f"error: --choose {op}={name}: no operator {op}: choose from {', '.join(CANDIDATES)}")
        names = [candidate.name for candidate in CANDIDATES[op]]
        if name not in names:
            sys.exit(f"error: --choose {op}={name}: {op} has no candidate {name}: choose from {', '.join(names)}")
    try:
        operators = {name: gpu_ops(GPUS[name], triton=args.ops == "triton", wanted=args.choose) for name in args.gpus}
    except OpsError as error:
        sys.exit(f"error: {error}")
    found = {
        **circumstances(torch.device("cpu")),
        "tokens": args.tokens,
        "documents": args.documents,
        "gpus": [gpu_row(GPUS[name], ops, args) for name, ops in operators.items()],
    }
    print("\n".join(page(found)))
    if args.json:
        write_json(args.json, found)


def gpu_row(gpu: Gpu, ops: Ops, args: argparse.Namespace) -> dict[str, Any]:
    """The counts of all blocks with the operators of one GPU, in JSON types."""
    return {
        "gpu": gpu.name,
        "implementations": list(ops.lines),
        "blocks": [
            block_row(PRESETS[preset], layer, args.tokens, args.documents, gpu, ops)
            for preset in args.presets
            for layer in kinds_of_blocks(PRESETS[preset].decoder).values()
        ],
    }


@dataclass(eq=False)
class Tally(TorchDispatchMode):
    """Launches and bytes of each operator and pass, while entered. Triton kernels do not run then.

    pass_: FORWARD or BACKWARD, set from outside
    """

    attribution: Attribution
    gpu: Gpu

    def __post_init__(self) -> None:
        super().__init__()
        self.pass_ = FORWARD
        self.work: dict[tuple[str, str], Work] = defaultdict(Work)
        self._stack = ExitStack()

    def __enter__(self) -> "Tally":
        self._stack.enter_context(gpu_kernels(self.gpu, self._add))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._stack.close()
        super().__exit__(*error)

    def __torch_dispatch__(self, operation: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = operation(*args, **(kwargs or {}))
        if launches_kernel(operation):
            self._add([leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)])
        return out

    def _add(self, tensors: Sequence[Tensor]) -> None:
        self.work[self.attribution.current, self.pass_] += Work(1, sum(map(distinct_bytes, tensors)))


def count_block(
    decoder: DecoderConfig, layer: int, tokens: int, documents: int, gpu: Gpu, ops: Ops
) -> tuple[dict[tuple[str, str], Work], dict[tuple[str, str], Work]]:
    """What block `layer` launches for one micro-batch in bf16, and the least that it could.

    Returns:
        Work by (operator, pass), measured and least.
    """
    attribution = Attribution()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with FakeTensorMode(), ops.products:
            block = Block(decoder, layer, TensorAxis(), ExpertAxis(), attribution.label_ops(ops))
            names = lay_flat(block)
            if decoder.has_experts(layer):
                router = block.mlp.router
                router.forward = attribution.label("router", router.forward, router.parameters())
            hidden = torch.empty(tokens, decoder.width, requires_grad=True)
            layout = _layout(decoder, tokens, documents)
            tally = Tally(attribution, gpu)
            with tally:
                with Products(attribution, partial(name_of, names=names)):
                    out = block(hidden.view_as(hidden), layout)
                tally.pass_ = BACKWARD
                out.backward(torch.empty_like(out))
    finally:
        torch.set_default_dtype(before)
    return dict(tally.work), _least(attribution, hidden, additions=3 if decoder.has_experts(layer) else 2)


def _layout(decoder: DecoderConfig, tokens: int, documents: int) -> PackLayout:
    lengths = (tokens // documents,) * documents
    width = decoder.head_width if decoder.mla is None else decoder.mla.rope_width
    cos, sin = rotary_tables(torch.arange(tokens), width, decoder.rope_theta)
    return PackLayout(torch.arange(documents + 1, dtype=torch.int32), lengths, 1, cos, sin)


def _least(attribution: Attribution, hidden: Tensor, additions: int) -> dict[tuple[str, str], Work]:
    """The least work of all calls. Of what no operator encloses, the residual additions (with experts also the sum of
    shared and routed ones) and as many sums of gradients are needed."""
    least: dict[tuple[str, str], Work] = defaultdict(Work)
    for call in attribution.calls:
        least[call.operator, FORWARD] += forward_bound(call)
        least[call.operator, BACKWARD] += backward_bound(call)
    for pass_ in (FORWARD, BACKWARD):
        least[REST, pass_] += residual_bound(hidden, additions)
    return dict(least)


def block_row(model: ModelConfig, layer: int, tokens: int, documents: int, gpu: Gpu, ops: Ops) -> dict[str, Any]:
    """A block's counts in JSON types; the operators are in the order of their calls."""
    measured, least = count_block(model.decoder, layer, tokens, documents, gpu, ops)
    operators = [
        {
            "operator": operator,
            **{
                pass_: {"measured": asdict(measured.get((operator, pass_), Work())), "least": asdict(bound)}
                for pass_ in (FORWARD, BACKWARD)
                for bound in [least[operator, pass_]]
            },
        }
        for operator in dict.fromkeys(operator for operator, _ in least)
    ]
    total = {name: asdict(sum(work.values(), Work())) for name, work in (("measured", measured), ("least", least))}
    return {
        "model": model.name,
        "layer": layer,
        "kind": "experts" if model.decoder.has_experts(layer) else "dense",
        "width": model.decoder.width,
        "tensors": "fake",
        "total": total,
        "operators": operators,
    }


def page(found: dict[str, Any]) -> Iterator[str]:
    """The result in Markdown."""
    yield heading(found)
    yield f"{found['tokens']} tokens in {found['documents']} documents, bf16, fake tensors: shapes without values"
    for row in found["gpus"]:
        yield from ("", f"### {row['gpu']}", "", *row["implementations"])
        for block in row["blocks"]:
            yield from _table(block)


def _table(block: dict[str, Any]) -> Iterator[str]:
    yield from ("", f"#### {block['model']}, block {block['layer']} ({block['kind']}), width {block['width']}", "")
    yield "| operator | launches forward + backward | least | MB forward + backward | least | bytes over least |"
    yield "|---|---|---|---|---|---|"
    for row in block["operators"]:
        measured, least = ([row[pass_][kind] for pass_ in (FORWARD, BACKWARD)] for kind in ("measured", "least"))
        yield (
            f"| {row['operator']} | {_sum(measured, 'launches')} | {_sum(least, 'launches')} | "
            f"{_sum(measured, 'bytes', 1e6)} | {_sum(least, 'bytes', 1e6)} | "
            f"{sum(work['bytes'] for work in measured) / sum(work['bytes'] for work in least):.2f} |"
        )
    measured, least = block["total"]["measured"], block["total"]["least"]
    yield (
        f"| **block** | {measured['launches']} | {least['launches']} | {measured['bytes'] / 1e6:,.0f} | "
        f"{least['bytes'] / 1e6:,.0f} | {measured['bytes'] / least['bytes']:.2f} |"
    )


def _sum(works: list[dict[str, int]], what: str, unit: float = 1.0) -> str:
    return " + ".join(f"{work[what] / unit:,.0f}" for work in works)
