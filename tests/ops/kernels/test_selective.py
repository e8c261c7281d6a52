"""Selective recomputation with the kernels: the norm of a kept sum is the one that was computed with the sum."""

import dataclasses

import torch

from megavl.model.run_block import call_block
from megavl.model.vlm import VLM
from megavl.runtime.selective import Selective
from tests.model import tiny
from tests.models import MLA_SOFTMAX
from tests.ops.kernels.interpreter import kernels
from tests.ops.kernels.test_model import triton_ops


def gradients(recompute: bool) -> list[torch.Tensor]:
    ops = dataclasses.replace(triton_ops(tiny.OPS), permutation=kernels("permutation").TRITON_PERMUTATION)
    mode = Selective()
    run_block, ops = (mode.run_block, mode.ops(ops)) if recompute else (call_block, ops)
    model = VLM(MLA_SOFTMAX, tiny.ONE, ops, 0, MLA_SOFTMAX.layers, run_block=run_block)
    tiny.randomise(model, seed=0)
    documents = [tiny.document(MLA_SOFTMAX, (length,), seed=length) for length in (7, 5)]
    model(None, tiny.pack(documents, tiny.pixels(MLA_SOFTMAX, images=0, seed=0), MLA_SOFTMAX)).backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def test_it_changes_no_bit(interpreted):
    off, recomputed = interpreted(gradients, False), interpreted(gradients, True)
    assert len(off) == len(recomputed) > 20
    assert all(map(torch.equal, off, recomputed))
