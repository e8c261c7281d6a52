"""What the encoder ahead of the passes does in a step, and what it keeps."""

import math
import weakref
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megavl.batch import StepBatch, TilesAhead
from megavl.config.run import RunConfig
from megavl.plan.cost import step_flops
from megavl.runtime import vision
from megavl.runtime.vision import AheadEncoder
from tests.models import changed
from tests.runtime.cases import MODEL, VL2, build, run_config, step_batch, train

MULTIMODAL, TEXT = 0, 1  # steps of `step_batch`
TOWERS_FROZEN = [{"match": r"^stem\.(siglip|sam)\.", "lr_multiplier": 0.0}]
ALL_FROZEN = [{"match": r"^stem\.", "lr_multiplier": 0.0}]


def ahead_config(world: int, rules: list | None = None, **parallel) -> RunConfig:
    parallel = {"pipeline": 2, "vision": "pipelined", "zero": 0} | parallel
    return run_config(world, parallel=parallel, train={"micro_batch": 3}, optim={"rules": rules or []})


class Counted:
    """`torch.distributed` for a module, which counts the collectives that the module calls."""

    def __init__(self):
        self.calls = Counter()

    def __getattr__(self, name: str):
        found = getattr(dist, name)
        if name not in ("broadcast", "reduce", "all_reduce", "all_to_all_single"):
            return found

        def call(*args, **kwargs):
            self.calls[name] += 1
            return found(*args, **kwargs)

        return call


def collectives(rules: list, parallel: dict) -> list[dict[str, int]]:
    """Those of the encoder on this rank, in steps one after another: text, evaluation, evaluation, multimodal step,
    text, text, multimodal step."""
    config = ahead_config(dist.get_world_size(), rules, **parallel)
    replica = build(config)
    batches = {kind: step_batch(kind, config, replica.mesh) for kind in (TEXT, MULTIMODAL)}
    works = [
        lambda: replica.step(batches[TEXT], 1e-3),
        lambda: replica.evaluate(batches[MULTIMODAL]),
        lambda: replica.evaluate(batches[MULTIMODAL]),
        lambda: replica.step(batches[MULTIMODAL], 1e-3),
        lambda: replica.step(batches[TEXT], 1e-3),
        lambda: replica.step(batches[TEXT], 1e-3),
        lambda: replica.step(batches[MULTIMODAL], 1e-3),
    ]
    found = []
    for work in works:
        vision.dist = Counted()
        work()
        found.append(dict(vision.dist.calls))
    vision.dist = dist
    return found


def test_a_text_step_communicates_nothing_and_weights_are_broadcast_when_they_have_changed(pool):
    step = {"all_to_all_single": 2, "reduce": 1}
    for found in pool.run(2, collectives, TOWERS_FROZEN, {}):
        assert found == [
            {},
            {"broadcast": 2, "all_to_all_single": 1},  # the frozen weights, and the others
            {"all_to_all_single": 1},
            step,
            {},
            {},
            {"broadcast": 1} | step,
        ]


def test_nothing_returns_from_a_frozen_encoder(pool):
    """The frozen weights are broadcast once."""
    for found in pool.run(2, collectives, ALL_FROZEN, {}):
        assert found == [{}, {"broadcast": 1, "all_to_all_single": 1}, *[{"all_to_all_single": 1}] * 2, {}, {}] + [
            {"all_to_all_single": 1}
        ]


def test_tensor_ranks_agree_on_the_sum_and_a_replica_alone_has_nothing_to_broadcast(pool):
    for found in pool.run(2, collectives, [], {"pipeline": 1, "tensor": 2}):
        assert found[1:4] == [{"all_to_all_single": 1}] * 2 + [{"all_to_all_single": 2, "all_reduce": 1}]
    for found in pool.run(2, collectives, [], {"pipeline": 1, "vision": "balanced"}):
        assert found[1:4] == [{"all_to_all_single": 1}] * 2 + [{"all_to_all_single": 2}]


def with_defect(config: RunConfig, method: str | None) -> tuple[list[float], Tensor]:
    """Losses of two multimodal steps with a text step between, and the adaptor's weight after them, where a method of
    the encoder does nothing."""
    if method is not None:
        setattr(AheadEncoder, method, lambda *_: None)
    history = train(changed(config, train={"steps": 3}))
    name = "stem.adaptor.proj.weight"
    return [loss for loss, _ in history.history], history.weights.get(name)


@pytest.mark.parametrize("method", ["_refresh", "weights_moved", "_sum_over_replica"])
def test_weights_or_gradients_that_stay_where_they_are_would_be_noticed(pool, method):
    config = ahead_config(2)
    right, wrong = (pool.run(2, with_defect, config, defect)[0] for defect in (None, method))
    loss = max(abs(one - other) for one, other in zip(right[0], wrong[0], strict=True))
    assert math.isnan(loss) or max(loss, (right[1] - wrong[1]).abs().max().item()) > 1e-3


class Kept:
    """Bytes that autograd keeps, of other tensors than parameters."""

    def __init__(self, parameters: set[int]):
        self._parameters = parameters
        self._live: Counter[int] = Counter()
        self._sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def pack(self, x: Tensor):
        storage = x.untyped_storage()
        if storage.data_ptr() in self._parameters:
            return lambda: x
        key = storage.data_ptr()
        if not self._live[key]:
            self._sizes[key] = storage.nbytes()
            self.now += self._sizes[key]
            self.peak = max(self.peak, self.now)
        self._live[key] += 1
        holder = lambda: x  # noqa: E731
        weakref.finalize(holder, self._release, key)
        return holder

    def _release(self, key: int) -> None:
        self._live[key] -= 1
        if not self._live[key]:
            self.now -= self._sizes[key]

    def hooks(self):
        return saved_tensors_hooks(self.pack, lambda holder: holder())


def kept_bytes(chunk: int, recompute: bool) -> tuple[int, int]:
    """Bytes between the passes, and at most, for 12 tiles in one process."""
    parallel = {"vision": "balanced", "vision_chunk": chunk, "zero": 0}
    config = run_config(1, parallel=parallel, train={"micro_batch": 3, "recompute_towers": recompute})
    replica = build(config)
    encoder = replica.pipeline.ahead
    kept = Kept({parameter.untyped_storage().data_ptr() for parameter in replica.stages.parameters()})
    with kept.hooks():
        features = encoder.forward(step_batch(MULTIMODAL, config, replica.mesh))
        between = kept.now
        for each in features:
            each.grad = torch.ones_like(each)
        encoder.backward()
    assert kept.now == 0
    return between, kept.peak


def test_with_recomputation_only_one_chunk_is_kept(pool):
    ((all_between, all_peak),) = pool.run(1, kept_bytes, 1, False)
    ((between, of_one),) = pool.run(1, kept_bytes, 1, True)
    ((_, of_four),) = pool.run(1, kept_bytes, 4, True)
    assert between == 0 and all_between == all_peak
    assert all_peak == pytest.approx(12 * of_one, rel=0.05)
    assert of_four == pytest.approx(4 * of_one, rel=0.05)


def counted_flops(config: RunConfig) -> tuple[int, int]:
    """FLOPs of a multimodal step in one process: what torch counts, and the plan's."""
    replica = build(config)
    batch = step_batch(MULTIMODAL, config, replica.mesh)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        replica.pipeline.train(batch)
    squared = sum(length**2 for micro_batch in batch.micro_batches for length in micro_batch.lengths)
    tokens = batch.tokens
    plan = step_flops(
        config,
        tokens=tokens,
        supervised_tokens=batch.supervised_tokens,
        squared_tokens=2 * squared - tokens,  # torch counts all pairs of causal attention
        tiles=batch.tiles,
    )
    return counter.get_total_flops(), plan.hardware


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("rules", [[], TOWERS_FROZEN, ALL_FROZEN], ids=["all", "adaptor", "decoder"])
@pytest.mark.parametrize("model", [MODEL, VL2["tiny"]], ids=["vl", "tiny"])
def test_flops_are_those_that_torch_counts(pool, model, rules, recompute):
    """Tiles are encoded a second time where a block of a tower needs a gradient."""
    config = run_config(
        1,
        model=model,
        parallel={"vision": "balanced", "zero": 0, "vision_chunk": 5},
        train={"micro_batch": 12, "recompute_towers": recompute},
        optim={"rules": rules},
    )
    ((torchs, ours),) = pool.run(1, counted_flops, config)
    assert torchs == ours


def refused(change: str) -> str:
    config = ahead_config(dist.get_world_size(), pipeline=1)
    replica = build(config)
    batch = step_batch(MULTIMODAL, config, replica.mesh)
    ahead = batch.ahead
    if change == "a tile too few":
        ahead = TilesAhead(ahead.by_replica, (ahead.pixels[0],))
    else:
        ahead = TilesAhead((11,), (ahead.pixels[0], ahead.pixels[1][:-1]))
    return message_of(replica.pipeline.ahead, changed_batch(batch, ahead))


def changed_batch(batch: StepBatch, ahead: TilesAhead) -> StepBatch:
    return StepBatch(**{**vars(batch), "ahead": ahead})


def message_of(encoder: AheadEncoder, batch: StepBatch) -> str:
    try:
        encoder.forward(batch)
    except ValueError as error:
        return str(error)


def test_tiles_that_are_not_this_ranks_are_refused(pool):
    (message,) = pool.run(1, refused, "a tile too few")
    assert "pixels of 1 tiles are here, but this rank encodes 12 of the 12 tiles of the step" in message
    (message,) = pool.run(1, refused, "replica of fewer tiles")
    assert "micro-batches have 12 tiles, but those of its replica are said to have 11" in message
