"""Compiled decoder blocks: number of graphs, no second compilation, the gradients of blocks that are not compiled."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import config as dynamo
from torch._dynamo.utils import counters
from torch._inductor import config as inductor
from torch._inductor.utils import fresh_cache

from megavl.model.block import Block
from megavl.model.run_block import call_block
from megavl.ops.products import Float32Products
from megavl.parallel.groups import ExpertAxis
from megavl.runtime.compiled import CompilerError, check_compiler, compilable, compile_blocks, hiding_documents
from megavl.runtime.recompute import recomputing
from tests.model import tiny
from tests.models import HYBRID, MLA_SIGMOID

# Four graphs: norm; products and rotation; product after attention; residual, norm and feed-forward layer. With routed
# experts the last one ends before them, the shared experts are the fifth, and their addition the sixth.
KINDS = {"dense": (HYBRID, 0, 4), "latent": (MLA_SIGMOID, 0, 4), "experts": (MLA_SIGMOID, 1, 6)}
BATCHES = ((7, 12, 5), (24,), (1, 2, 3, 18), (12, 12), (1, 22, 1))


@pytest.fixture(autouse=True)
def compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def two_blocks(config, layer: int, ops) -> nn.ModuleList:
    blocks = nn.ModuleList(Block(config.decoder, layer, tiny.ONE, ExpertAxis(), ops) for _ in range(2))
    tiny.randomise(blocks, seed=0)
    return blocks


def gradients(blocks: nn.ModuleList, config, lengths: tuple[int, ...], run_block) -> list[Tensor]:
    """Output and gradients of two blocks of one kind."""
    blocks.zero_grad()
    h = torch.randn(sum(lengths), config.decoder.width, generator=torch.Generator().manual_seed(0))
    h = h.to(next(blocks.parameters()).dtype).requires_grad_()
    layout, x = tiny.layout(config.decoder, lengths), h
    for block in blocks:
        x = run_block(block, x, layout)
    x.square().sum().backward()
    return [x.detach(), h.grad, *(parameter.grad for parameter in blocks.parameters())]


def compiled(config, layer: int, backend: str) -> nn.ModuleList:
    blocks = two_blocks(config, layer, compilable(tiny.OPS))
    compile_blocks(blocks, backend)
    return blocks


@pytest.mark.parametrize("kind", KINDS)
def test_batches_of_other_documents_share_the_graphs_of_a_kind(kind):
    config, layer, graphs = KINDS[kind]
    plain, fast = two_blocks(config, layer, tiny.OPS), compiled(config, layer, "aot_eager")
    run_block = hiding_documents(call_block)
    gradients(fast, config, BATCHES[0], run_block)
    assert counters["stats"]["unique_graphs"] == graphs
    with dynamo.patch(error_on_recompile=True):
        for lengths in BATCHES:
            expected, found = gradients(plain, config, lengths, call_block), gradients(fast, config, lengths, run_block)
            assert worst(found, expected) < 1e-5
    assert counters["stats"]["unique_graphs"] == graphs


def worst(found: list[Tensor], expected: list[Tensor]) -> float:
    """Greatest error, relative to the greatest value of its tensor."""
    pairs = list(zip(found, expected, strict=True))
    error = max(((a - b).abs().max() / b.abs().max().clamp(min=1e-9)).item() for a, b in pairs)
    print(f"{error:.1e}")
    return error


def test_documents_that_are_not_hidden_compile_again():
    config, layer, _ = KINDS["dense"]
    blocks = two_blocks(config, layer, tiny.OPS)
    compile_blocks(blocks, "eager")
    gradients(blocks, config, BATCHES[0], call_block)
    with dynamo.patch(error_on_recompile=True), pytest.raises(torch._dynamo.exc.RecompileError, match="lengths"):
        gradients(blocks, config, BATCHES[1], call_block)


def test_kernels_run_between_graphs():
    """An operator that Dynamo cannot trace, as those of Triton, which read addresses."""

    def kernel(gate: Tensor, up: Tensor) -> Tensor:
        assert gate.data_ptr() and up.data_ptr()
        return tiny.OPS.swiglu(gate, up)

    config, layer, graphs = KINDS["dense"]
    blocks = two_blocks(config, layer, compilable(replace(tiny.OPS, swiglu=kernel)))
    compile_blocks(blocks, "aot_eager")
    found = gradients(blocks, config, BATCHES[0], hiding_documents(call_block))
    assert counters["stats"]["unique_graphs"] > graphs
    assert list(counters["graph_break"]) and all("disable" in reason for reason in counters["graph_break"])
    expected = gradients(two_blocks(config, layer, tiny.OPS), config, BATCHES[0], call_block)
    assert worst(found, expected) < 1e-5


def test_bf16_products_through_fp32():
    """The context of a CPU without bf16 units, which replaces torch's products."""
    config, layer, _ = KINDS["dense"]
    plain, fast = two_blocks(config, layer, tiny.OPS).bfloat16(), compiled(config, layer, "aot_eager").bfloat16()
    run_block = hiding_documents(call_block)
    with Float32Products():
        gradients(fast, config, BATCHES[0], run_block)
        with dynamo.patch(error_on_recompile=True):
            found = gradients(fast, config, BATCHES[1], run_block)
        expected = gradients(plain, config, BATCHES[1], call_block)
    assert worst(found, expected) == 0.0


def test_inductor_and_recomputation():
    config, layer, graphs = KINDS["dense"]
    plain, fast = two_blocks(config, layer, tiny.OPS), compiled(config, layer, "inductor")
    expected = gradients(plain, config, BATCHES[0], call_block)
    for run_block in (call_block, recomputing(nullcontext())):
        found = gradients(fast, config, BATCHES[0], hiding_documents(run_block))
        assert worst(found, expected) < 1e-5
    assert counters["stats"]["unique_graphs"] == graphs


def test_a_machine_without_a_compiler_is_refused():
    # Without a fresh cache the addition would be there already, compiled.
    with fresh_cache(), inductor.patch({"cpp.cxx": (None, "no-such-compiler")}), pytest.raises(CompilerError) as error:
        check_compiler(torch.device("cpu"))
    assert "train.compile = true, but torch cannot compile for cpu: " in str(error.value)
    assert "no-such-compiler" in str(error.value)
    print(error.value)
