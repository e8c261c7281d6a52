"""Decoder blocks compiled by torch (Dynamo and Inductor).

Inductor fuses norms, the rotation, SwiGLU and the residual additions; products remain those of its libraries. Two parts
of a block are not traced: attention, whose work depends on the documents, and the routed experts, whose numbers of rows
differ with every batch. Shared experts are compiled. In a graph, weights that lie end to end are multiplied one by one,
because nothing in it may depend on addresses.

A graph serves all blocks of its kind and every batch: the shapes of a micro-batch are fixed, and what differs between
batches is hidden from Dynamo, which would compile again.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megavl.model.block import Block
from megavl.model.layout import PackLayout
from megavl.model.moe import Moe
from megavl.model.run_block import RunBlock
from megavl.ops.activation import swiglu
from megavl.ops.dispatch import Ops
from megavl.ops.norm import REFERENCE_NORMS
from megavl.ops.rope import REFERENCE_ROTARY

_TRACED = (
    *(REFERENCE_NORMS.rms_norm, REFERENCE_NORMS.add_rms_norm),
    *(REFERENCE_ROTARY.halves, REFERENCE_ROTARY.latent),
    swiglu,
)


class CompilerError(OSError):
    """torch cannot compile for the device of this process."""


@dataclass(frozen=True)
class _Documents:
    """The borders of a layout as an object that Dynamo does not look into."""

    cu_seqlens: Tensor
    lengths: Sequence[int]


def check_compiler(device: torch.device) -> None:
    """Compile and run one addition. Raises CompilerError with the compiler's own message where that fails."""
    try:
        torch.compile(torch.add, dynamic=False)(torch.ones(1, device=device), 1)
    except Exception as error:  # any: Inductor, Triton and the host's compiler have their own
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CompilerError(
            f"train.compile = true, but torch cannot compile for {device}: {reason[:200]}; install a C++ compiler "
            "(g++, or CXX=...) with the headers of Python, or set train.compile=false"
        ) from error


def compilable(ops: Ops) -> Ops:
    """`ops` for compiled blocks. Kernels of libraries and of `megavl.ops.kernels` run between two graphs."""
    attention = ops.attention

    @torch.compiler.disable
    def attend(q: Tensor, k: Tensor, v: Tensor, documents: _Documents, _: _Documents) -> Tensor:
        return attention(q, k, v, documents.cu_seqlens, documents.lengths)

    names = ("rms_norm", "add_rms_norm", "rotate_halves", "rotate_latent", "swiglu")
    return replace(ops, attention=attend, **{name: _between_graphs(getattr(ops, name)) for name in names})


def _between_graphs(implementation: Callable) -> Callable:
    return implementation if implementation in _TRACED else torch.compiler.disable(implementation)


def hiding_documents(run_block: RunBlock) -> RunBlock:
    """`run_block` for blocks with the operators of `compilable`."""

    def run(block: Block, h: Tensor, layout: PackLayout) -> Tensor:
        documents = _Documents(layout.cu_seqlens, layout.lengths)
        return run_block(block, h, replace(layout, cu_seqlens=documents, lengths=documents))

    return run


def compile_blocks(blocks: Iterable[Block], backend: str = "inductor") -> None:
    """Compile each block when it is first called."""
    for block in blocks:
        if isinstance(block.mlp, Moe):
            block.mlp.forward = torch.compiler.disable(block.mlp.forward)
            block.mlp.shared.compile(dynamic=False, backend=backend)
        block.compile(dynamic=False, backend=backend)
