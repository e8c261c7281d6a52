"""The layout of a micro-batch: made once, and all that decoder blocks get besides their input."""

from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megavl.model.layout import PackLayout
from megavl.model.run_block import call_block
from megavl.model.vlm import VLM
from megavl.ops.rope import rotary_tables
from megavl.runtime.recompute import recomputing
from tests.model import tiny
from tests.models import HYBRID, MLA_SIGMOID, MLA_SOFTMAX, changed

CONFIGS = pytest.mark.parametrize("config", [HYBRID, MLA_SIGMOID], ids=lambda config: config.name)


class Operators(TorchDispatchMode):
    """Names of the operators that run while it is entered."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.names.append(operator.overloadpacket.__name__)
        return operator(*args, **(kwargs or {}))


def batch_of(config):
    """Two documents of text."""
    documents = [tiny.document(config, (length,), seed=length) for length in (7, 5)]
    return tiny.pack(documents, tiny.pixels(config, images=0, seed=0), config)


@CONFIGS
@pytest.mark.parametrize("run_block", [call_block, recomputing(nullcontext())], ids=["kept", "recomputed"])
def test_rotary_tables_are_computed_once_in_a_micro_batch(config, run_block):
    """Forward and backward, with any number of blocks."""
    model = VLM(config, tiny.ONE, tiny.OPS, 0, config.layers, run_block=run_block)
    tiny.randomise(model, seed=0)
    assert len(model.blocks) > 1
    with Operators() as operators:
        model(None, batch_of(config)).backward()
    assert operators.names.count("cos") == operators.names.count("sin") == 1


def test_a_slice_without_blocks_needs_no_layout():
    stem = VLM(HYBRID, tiny.ONE, tiny.OPS, 0, 1)
    tiny.randomise(stem, seed=0)
    with Operators() as operators:
        stem(None, batch_of(HYBRID))
    assert "cos" not in operators.names


@CONFIGS
def test_it_is_all_that_a_block_gets(config):
    """One and the same for all blocks of a micro-batch, which give the same logits by themselves."""
    layouts = []

    def run_block(block, h, layout):
        layouts.append(layout)
        return block(h, layout)

    plain = tiny.random_model(config)
    model = VLM(config, tiny.ONE, tiny.OPS, 0, config.layers, run_block=run_block)
    model.load_state_dict(plain.state_dict())
    batch = batch_of(config)
    assert torch.equal(model.logits(batch), plain.logits(batch))
    assert len(layouts) == config.decoder.layers
    assert {type(layout) for layout in layouts} == {PackLayout} and len(set(map(id, layouts))) == 1
    h = plain.stem(batch)
    for block in plain.blocks.values():
        h = block(h, layouts[0])
    assert torch.equal(plain.head.logits(h), plain.logits(batch))


@pytest.mark.parametrize(("config", "width"), [(HYBRID, 8), (MLA_SOFTMAX, 6)], ids=["heads", "rope width"])
def test_its_tables_cover_the_positioned_channels(config, width):
    decoder = changed(config.decoder, rope_theta=500.0)
    batch = batch_of(config)
    layout = PackLayout.of(batch, decoder)
    cos, sin = rotary_tables(batch.positions, width, 500.0)
    assert torch.equal(layout.cos, cos) and torch.equal(layout.sin, sin)
    assert layout.cos.dtype == torch.float32
    assert (layout.lengths, layout.packs, layout.cu_seqlens.tolist()) == ((7, 5), 1, [0, 7, 12])
