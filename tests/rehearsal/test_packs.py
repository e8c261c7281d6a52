"""Made-up packs: where their images are, and which rank has the pixels."""

import pytest

from megavl.config.error import ConfigError
from megavl.config.presets import PRESETS
from megavl.config.tiles import Tiling
from megavl.parallel.groups import Axis, Mesh, TensorAxis
from megavl.parallel.topology import Topology
from megavl.rehearsal.packs import grid_of, made_up_batch, made_up_step
from tests.config.runs import make_run

ONE_RANK = Mesh(Topology(1, 1, 1), Axis(), Axis(), TensorAxis(), Axis(), Axis(), Axis())


@pytest.mark.parametrize(("preset", "grid", "tiles"), [("vl_debug", None, 3), ("vl2_debug", "2x2", 15)])
def test_images_of_a_made_up_batch_have_their_places(preset, grid, tiles):
    config = make_run(model=PRESETS[preset], data={"seq_len": 500})
    grid, tiling = grid_of(config, grid), Tiling(config.model)
    pack = made_up_batch(config, 3, grid, ONE_RANK)
    assert (pack.tokens == config.model.image_token_id).sum() == 3 * tiling.tokens[tiling.grids.index(grid)]
    assert pack.grids == (grid,) * 3
    assert len(pack.pixels) == tiles
    with pytest.raises(ConfigError, match="--grid 7x7 is none of"):
        grid_of(config, "7x7")


@pytest.mark.parametrize("vision", ["replicated", "sharded", "pipelined", "balanced"])
def test_a_made_up_step_has_pixels_where_they_are_encoded(vision):
    config = make_run(data={"seq_len": 500}, parallel={"vision": vision})
    packs = config.train.global_batch
    for kind, tiles in (("multimodal", 3), ("text", 0)):
        step = made_up_step(config, ONE_RANK, kind, 3, grid_of(config, None))
        assert step.tiles == packs * tiles
        if config.parallel.encodes_ahead:
            assert step.ahead.by_replica == (packs * tiles,)
            assert sum(map(len, step.ahead.pixels)) == packs * tiles
            assert all(batch.pixels is None for batch in step.micro_batches)
        else:
            assert step.ahead is None
            assert all(len(batch.pixels) == tiles for batch in step.micro_batches)


def test_each_document_needs_a_token():
    config = make_run(model=PRESETS["vl_debug"])
    with pytest.raises(ConfigError, match=r"500 documents are more than the \d+ tokens of a pack"):
        made_up_batch(config, 0, grid_of(config, None), ONE_RANK, 500)
