"""No layer reads a value from the device inside a micro-batch: fake tensors have no values, and a read raises.

The stage runs with the operators of a Hopper GPU, forward and backward.
"""

import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from megavl.batch import Batch, StepBatch, TilesAhead
from megavl.config.model import ModelConfig
from megavl.config.tiles import Grid
from megavl.model.vlm import VLM
from megavl.ops.activation import swiglu
from megavl.ops.dispatch import Ops, choose
from megavl.ops.expert_mlp import ComposedExpertMlp
from megavl.ops.grouped import reference_grouped_linear
from megavl.parallel.groups import Axis, ExpertAxis, Mesh, TensorAxis
from megavl.parallel.topology import Topology
from megavl.runtime.feed import Feed
from megavl.runtime.stage import Stage
from megavl.runtime.vision import AheadEncoder
from tests.config.runs import make_run
from tests.model import tiny
from tests.ops.hopper import hopper
from tests.runtime.test_kernels import ALIGNED


@pytest.fixture(scope="module")
def ops() -> Ops:
    with hopper():
        return choose(torch.device("cuda"))


def batch_of(config: ModelConfig, images: int) -> Batch:
    """Two documents, the first with images."""
    grids = (Grid(0, 0) if config.tiling is None else Grid(1, 2),) * images
    text = tiny.document(config, (5,) * (1 + images), 0, grids)
    return tiny.pack([text, text[-5:]], tiny.pixels(config, sum(grid.tiles for grid in grids), 0), config, grids)


def step(config: ModelConfig, ops: Ops, images: int) -> list[str]:
    """Names of the parameters that have a gradient after a micro-batch."""
    fake = FakeTensorMode()
    batch = batch_of(config, images).map_tensors(fake.from_tensor)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with fake:
            vlm = VLM(config, TensorAxis(), ops, 0, config.layers)
            stage = Stage(vlm, groups=2)
            stage(None, next(Feed([batch], torch.device("cpu")).batches())).backward()
    finally:
        torch.set_default_dtype(torch.float32)
    return [name for name, parameter in vlm.named_parameters() if parameter.grad is not None]


@pytest.mark.parametrize("images", [0, 2])
@pytest.mark.parametrize("model", ALIGNED)
def test_a_micro_batch_reads_nothing(ops, model, images):
    with_gradients = step(ALIGNED[model], ops, images)
    assert any(name.startswith("stem.siglip") for name in with_gradients) == bool(images)
    assert {"head.proj.weight", "stem.embedding.weight"} < set(with_gradients)


@pytest.mark.parametrize("model", ALIGNED)
def test_tiles_that_are_encoded_before_the_passes_read_nothing(model):
    """On one rank: features, and the gradients of the weights that they return."""
    config = ALIGNED[model]
    run = make_run(model=config, parallel={"vision": "balanced", "vision_chunk": 2}, train={"recompute_towers": True})
    mesh = Mesh(Topology(1, 1, 1), Axis(), Axis(), TensorAxis(), ExpertAxis(), Axis(), Axis())
    fake, ops = FakeTensorMode(), choose(torch.device("cpu"))
    batch = batch_of(config, images=2)
    ahead = TilesAhead((batch.tiles,), (fake.from_tensor(batch.pixels),))
    torch.set_default_dtype(torch.bfloat16)
    try:
        with fake:
            stages = torch.nn.ModuleList([Stage(VLM(config, TensorAxis(), ops, 0, 1), groups=2)])
            encoder = AheadEncoder(stages, run, mesh, torch.device("cpu"))
            step_batch = StepBatch(0, "multimodal", (batch,), 1, 1, 2, batch.tiles, 1, ahead=ahead)
            (features,) = encoder.forward(step_batch)
            features.backward(torch.ones_like(features))
            encoder.backward()
    finally:
        torch.set_default_dtype(torch.float32)
    assert features.shape == (batch.tiles, config.tile_features, config.decoder.width)
    for name, parameter in stages[0].vlm.stem.named_parameters():
        assert (parameter.grad is not None) == name.startswith(("siglip", "sam", "adaptor")), name


def test_a_read_would_be_noticed(ops):
    loop = ComposedExpertMlp(reference_grouped_linear, swiglu)
    with pytest.raises(DataDependentOutputException):
        step(ALIGNED["small"], dataclasses.replace(ops, expert_mlp=loop), images=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("images", [0, 2])
@pytest.mark.parametrize("model", ALIGNED)
def test_a_gpu_is_not_waited_for(model, images):
    """torch raises at any operation that waits for the device."""
    config, device = ALIGNED[model], torch.device("cuda")
    vlm = VLM(config, TensorAxis(), choose(device), 0, config.layers)
    tiny.randomise(vlm, seed=0)
    stage = Stage(vlm, groups=2).to(device, torch.bfloat16)
    batch = batch_of(config, images).pin_memory()
    for mode in ("default", "error"):  # libraries may wait at their first call
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(mode)
        try:
            for micro_batch in Feed([batch, batch], device).batches():
                stage(None, micro_batch).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_feed_gives_the_micro_batches_in_their_order():
    config = ALIGNED["vl"]
    given = [batch_of(config, images) for images in (1, 0, 2)]
    feed = Feed(given, torch.device("cpu"))
    for ours, theirs in zip(feed.batches(), given, strict=True):
        assert torch.equal(ours.tokens, theirs.tokens) and torch.equal(ours.pixels, theirs.pixels)
    for ours, theirs in zip(feed.texts(), given, strict=True):
        assert torch.equal(ours.labels, theirs.labels) and ours.pixels is None
    features = [torch.empty(0), None, torch.ones(2)]
    for ours, theirs, given_features in zip(feed.featured(features), given, features, strict=True):
        assert torch.equal(ours.tokens, theirs.tokens) and ours.pixels is None and ours.features is given_features
    without = [dataclasses.replace(batch, pixels=None) for batch in given]
    assert len(list(Feed(without, torch.device("cpu")).texts())) == 3
