"""Recomputed blocks, of the decoder and of the towers: the same gradients, without the state of a random generator."""

from contextlib import nullcontext

import pytest
import torch

from megavl.config.tiles import Grid
from megavl.model.run_block import call_block
from megavl.model.vlm import VLM
from megavl.runtime.recompute import recomputing
from tests.model import tiny
from tests.models import HYBRID, MLA_SIGMOID


def run(config, run_block, run_tower_block) -> list[torch.Tensor]:
    """Loss and gradients of a batch with an image."""
    model = VLM(config, tiny.ONE, tiny.OPS, 0, config.layers, run_block=run_block, run_tower_block=run_tower_block)
    tiny.randomise(model, seed=0)
    grid = Grid(0, 0) if config.tiling is None else Grid(1, 1)
    document = tiny.document(config, (7, 5), seed=1, grids=(grid,))
    batch = tiny.pack([document], tiny.pixels(config, images=grid.tiles, seed=0), config, grids=(grid,))
    before = torch.get_rng_state()
    loss = model(None, batch)
    loss.backward()
    assert torch.equal(torch.get_rng_state(), before)  # recomputation keeps no copy of it
    return [loss, *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]


@pytest.mark.parametrize("config", [HYBRID, MLA_SIGMOID], ids=lambda config: config.name)
def test_it_changes_no_bit_and_draws_no_random_number(config):
    calls = []

    def counted(block, *inputs):
        calls.append(type(block).__name__)
        return recomputing(nullcontext())(block, *inputs)

    off, recomputed = run(config, call_block, call_block), run(config, counted, counted)
    assert all(map(torch.equal, off, recomputed)) and len(off) == len(recomputed)
    assert set(calls) == {"Block", "SiglipBlock"} | ({"SamBlock"} if config is HYBRID else set())
