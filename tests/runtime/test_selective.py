"""Selective recomputation: the same gradients to the bit, and less that is kept."""

import dataclasses
import time
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function
from torch.multiprocessing.reductions import StorageWeakRef

from megavl.config.model import ModelConfig
from megavl.model.block import Block
from megavl.model.run_block import call_block
from megavl.model.vlm import VLM
from megavl.ops.dispatch import Ops
from megavl.ops.expert_mlp import ComposedExpertMlp
from megavl.parallel import collectives
from megavl.parallel.groups import ExpertAxis, TensorAxis
from megavl.runtime import selective
from megavl.runtime.selective import Selective
from tests.model import tiny
from tests.models import HYBRID, MHA_SOFTMAX, MLA_SIGMOID

MODELS = pytest.mark.parametrize("config", [HYBRID, MHA_SOFTMAX, MLA_SIGMOID], ids=lambda config: config.name)


def gradients(config: ModelConfig, recompute: bool, dtype: torch.dtype, ops: Ops = tiny.OPS) -> list[Tensor]:
    """Loss and gradients of a text batch."""
    mode = Selective()
    run_block, ops = (mode.run_block, mode.ops(ops)) if recompute else (call_block, ops)
    model = VLM(config, tiny.ONE, ops, 0, config.layers, run_block=run_block)
    tiny.randomise(model, seed=0)
    model.to(dtype)
    documents = [tiny.document(config, (length,), seed=length) for length in (7, 5)]
    with ops.products:
        loss = model(None, tiny.pack(documents, tiny.pixels(config, images=0, seed=0), config))
        loss.backward()
    return [loss, *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]


@MODELS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_changes_no_bit(config, dtype):
    off, recomputed = (gradients(config, recompute, dtype) for recompute in (False, True))
    assert len(off) == len(recomputed) > 20
    assert all(map(torch.equal, off, recomputed))


def test_products_use_what_is_computed_again(monkeypatch):
    """Negative control: if that is wrong, so are the gradients."""
    off, tensor = gradients(HYBRID, False, torch.float32), selective.Derived.tensor
    monkeypatch.setattr(selective.Derived, "tensor", lambda derived: 2 * tensor(derived))
    assert not all(map(torch.equal, off, gradients(HYBRID, True, torch.float32)))


def watched(ops: Ops, outputs: dict[str, list[StorageWeakRef]]) -> Ops:
    """`ops` that note the storages of their outputs: of the norms the normalised values."""

    def watch(name: str, function):
        def call(*inputs):
            out = function(*inputs)
            output = out[-1] if isinstance(out, tuple) else out
            outputs.setdefault(name, []).append(StorageWeakRef(output.untyped_storage()))
            return out

        return call

    names = ("rms_norm", "add_rms_norm", "swiglu")
    changes = {name: watch(name, getattr(ops, name)) for name in names}
    spread = dataclasses.replace(ops.permutation, spread=watch("spread", ops.permutation.spread))
    expert_mlp = ComposedExpertMlp(ops.grouped_linear, changes["swiglu"])
    return dataclasses.replace(ops, permutation=spread, expert_mlp=expert_mlp, **changes)


def run_one_block(config: ModelConfig, recompute: bool) -> tuple[dict[str, list[bool]], Counter]:
    """Which outputs live after the forward pass of the last block, by operator; and how often each was computed until
    the end of the backward pass."""
    outputs, mode = {}, Selective()
    ops = watched(tiny.OPS, outputs)
    run_block, ops = (mode.run_block, mode.ops(ops)) if recompute else (call_block, ops)
    block = Block(config.decoder, config.decoder.layers - 1, tiny.ONE, ExpertAxis(), ops)
    tiny.randomise(block, seed=0)
    h = torch.randn(12, config.decoder.width, requires_grad=True)
    out = run_block(block, h, tiny.layout(config.decoder, (7, 5)))
    alive = {name: [not reference.expired() for reference in each] for name, each in outputs.items()}
    out.sum().backward()
    return alive, Counter({name: len(each) for name, each in outputs.items()})


@MODELS
def test_outputs_are_not_kept_and_computed_once_more(config):
    kept, once = run_one_block(config, recompute=False)
    freed, twice = run_one_block(config, recompute=True)
    assert all(all(each) for each in kept.values()) and not any(any(each) for each in freed.values())
    # The norm of a sum is computed again as a norm of the kept sum.
    norms = once["rms_norm"] + once["add_rms_norm"]
    assert twice - once == Counter(rms_norm=norms, swiglu=once["swiglu"], spread=once["spread"])


def test_without_a_gradient_nothing_is_recorded():
    mode, alive = Selective(), []

    def block(h: Tensor, _layout: None) -> Tensor:
        reference = StorageWeakRef(mode.call(torch.neg, h).untyped_storage())
        alive.append(not reference.expired())
        return h

    h = torch.ones(3, requires_grad=True)
    with torch.no_grad():
        mode.run_block(block, h, None)
    mode.run_block(block, h, None)
    assert alive == [False, True]


@pytest.mark.parametrize("used", [True, False], ids=["used", "unused"])
def test_a_graph_without_a_backward_pass_is_freed(used):
    """The node of an exponential keeps its own output."""
    references = []

    def block(h: Tensor, _layout: None) -> Tensor:
        exponential = h.exp()
        references.append(StorageWeakRef(exponential.untyped_storage()))
        return exponential * 2 if used else h * 2

    out = Selective().run_block(block, torch.ones(3, requires_grad=True), None)
    assert references[0].expired() != used
    del out
    assert references[0].expired()


class Product(Function):
    """Keeps both operands, as the grouped products do."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        return grad @ weight.t(), x.t() @ grad


def test_a_parameter_is_kept_as_itself():
    """ZeRO-3 takes its data away after the forward pass, and the backward pass reads what it has put there since."""
    weight, x = nn.Parameter(torch.eye(2)), torch.ones(3, 2, requires_grad=True)
    out = Selective().run_block(lambda x, _: Product.apply(x, weight), x, None)
    reference = StorageWeakRef(weight.untyped_storage())
    weight.data = torch.empty(0)
    assert reference.expired()
    weight.data = 3 * torch.eye(2)
    out.sum().backward()
    assert torch.equal(x.grad, torch.full((3, 2), 3.0))


def gathers(recompute: bool) -> tuple[list[bool], Counter]:
    """Which gathered inputs live after the forward pass of a block under sequence parallelism, and the number of
    all-gathers in the forward pass and in all."""
    tp = TensorAxis(dist.get_rank(), dist.get_world_size(), dist.group.WORLD, sequence=True)
    references, all_gather, mode = [], collectives.all_gather_single, Selective()

    def noted(whole: Tensor, part: Tensor, **kwargs) -> dist.Work | None:
        references.append(StorageWeakRef(whole.untyped_storage()))
        return all_gather(whole, part, **kwargs)

    collectives.all_gather_single = noted
    run_block, ops = call_block, tiny.OPS
    if recompute:
        run_block, ops, tp = mode.run_block, mode.ops(ops), mode.tensor_axis(tp)
    block = Block(HYBRID.decoder, 0, tp, ExpertAxis(), ops)
    tiny.randomise(block, seed=0)
    h = torch.randn(6, HYBRID.decoder.width, requires_grad=True)
    out = run_block(block, h, tiny.layout(HYBRID.decoder, (7, 5)))
    forward, deadline = len(references), time.monotonic() + (5.0 if recompute else 0.0)
    # gloo's thread may refer to the tensors of a collective for a moment after its end.
    while not all(reference.expired() for reference in references) and time.monotonic() < deadline:
        time.sleep(0.001)
    alive = [not reference.expired() for reference in references]
    out.sum().backward()
    return alive, Counter(forward=forward, all=len(references))


def test_under_sequence_parallelism_tokens_are_gathered_again(pool):
    # In the backward pass each of the two row-parallel products gathers the gradient of its output.
    for (kept, counts), (freed, again) in zip(pool.run(2, gathers, False), pool.run(2, gathers, True), strict=True):
        assert (kept, counts) == ([True, True], Counter(forward=2, all=4))
        assert (freed, again) == ([False, False], Counter(forward=2, all=6))
