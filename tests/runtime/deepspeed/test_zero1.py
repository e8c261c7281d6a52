"""ZeRO-1 in bf16: kernels, bytes and messages of accumulation, reduction and step; when reductions start; the norm."""

from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from megavl.config.run import RunConfig
from megavl.runtime.deepspeed import zero1
from tests.runtime.cases import VL2, build, run_config, step_batch

DP = run_config(2, train={"precision": "bf16"})
TP = run_config(2, train={"precision": "bf16"}, parallel={"tensor": 2, "sequence": True})
EXPERTS = run_config(2, model=VL2["base"], train={"precision": "bf16"}, parallel={"expert": 2})


class Watch(TorchDispatchMode):
    """Counts operations, and elements of fp32 tensors that are made."""

    def __init__(self):
        super().__init__()
        self.calls, self.largest_fp32 = Counter(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        self.calls[name] += 1
        if name in ("_to_copy", "clone", "empty", "zeros", "cat", "stack") and result.dtype == torch.float32:
            self.largest_fp32 = max(self.largest_fp32, result.numel())
        return result


def watched_step(config: RunConfig) -> dict:
    """What the engine's step does after the passes of a step, and the messages of either."""
    replica = build(config)
    optimizer = replica.engine.optimizer
    messages = Counter()

    def noting(name: str, called):
        def noted(*args, **kwargs):
            messages[name] += args[-1].numel() if name != "all_reduce" else args[0].numel()
            return called(*args, **kwargs)

        return noted

    scatter = noting("reduce_scatter", zero1.reduce_scatter_single)
    with mock.patch.object(zero1, "reduce_scatter_single", scatter):
        replica.pipeline.train(step_batch(0, config, replica.mesh))
    with (
        mock.patch.object(zero1, "reduce_scatter_single", scatter),
        mock.patch.object(zero1, "all_gather_single", noting("all_gather", zero1.all_gather_single)),
        mock.patch.object(dist, "all_reduce", noting("all_reduce", dist.all_reduce)),
        Watch() as watch,
    ):
        replica.engine.step()
    return {
        "elements": sum(len(flat) for flat in optimizer.fp32_groups_gradients_flat),
        "groups": len(optimizer.fp32_groups_gradients_flat),
        "messages": messages,
        "calls": watch.calls,
        "largest_fp32": watch.largest_fp32,
    }


@pytest.mark.parametrize("config", [DP, TP, EXPERTS], ids=["dp", "tp", "experts"])
def test_a_step_waits_for_nothing_and_copies_no_gradient(pool, config):
    for found in pool.run(2, watched_step, config):
        assert not found["calls"]["_local_scalar_dense"] and not found["calls"]["item"]
        assert found["largest_fp32"] < found["elements"] / 20
        assert found["messages"]["all_reduce"] == 1  # the squared norm
        if config is DP:
            assert found["messages"]["reduce_scatter"] == found["elements"]
            assert found["messages"]["all_gather"] == found["elements"] / 2
        # Of each group: scaling, norm, clipping, update, copy to bf16; not a kernel for each parameter.
        assert sum(found["calls"].values()) < 40 * found["groups"]


def watched_accumulation() -> list[tuple[Counter, int]]:
    """Of one parameter, in two micro-batches of a step; the buffer holds what an earlier step has left."""
    replica = build(run_config(1, train={"precision": "bf16"}))
    optimizer = replica.engine.optimizer
    read = next(stage.vlm for stage in replica.stages).head.proj.weight
    index = next(index for index, each in enumerate(optimizer.bf16_groups[0]) if each is read)
    parameter, total = read, optimizer.fp32_groups_gradients[0][index]
    total.fill_(7)
    watches = []
    for micro_batch in (1, 2):
        parameter.grad = torch.ones_like(parameter)
        with Watch() as watch:
            optimizer.accumulate_hp_grads_and_remove_lp(parameter, 0, index)
        assert parameter.grad is None and torch.equal(total, torch.full_like(total, micro_batch))
        watches.append((watch.calls, watch.largest_fp32))
    return watches


def test_a_gradient_is_added_without_a_copy_in_fp32(pool):
    ((first, second),) = pool.run(1, watched_accumulation)
    for (calls, largest_fp32), kernel in ((first, "copy_"), (second, "add_")):
        assert calls[kernel] == 1 and calls["copy_"] + calls["add_"] == 1 and largest_fp32 == 0


def tower_gradients(zero: bool) -> list[float]:
    """The largest gradient of the towers in the buffers, after a multimodal step and in the text step that follows;
    with or without the zeros for what has no gradient."""
    config = run_config(2, train={"precision": "bf16"})
    replica = build(config)
    optimizer = replica.engine.optimizer
    towers = {id(parameter) for name, parameter in replica.stages.named_parameters() if "siglip" in name}
    gradients = [
        gradient
        for group, each in zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients, strict=True)
        for parameter, gradient in zip(group, each, strict=True)
        if id(parameter) in towers
    ]
    found = []
    with nullcontext() if zero else mock.patch.object(torch, "_foreach_zero_"):
        for number, kind in enumerate(("multimodal", "text")):
            batch = step_batch(number, config, replica.mesh)
            assert batch.kind == kind
            replica.pipeline.train(batch)
            optimizer.reduce_gradients(pipeline_parallel=False)
            found.append(max(gradient.abs().max().item() for gradient in gradients))
    return found


def test_a_text_step_leaves_the_towers_gradients_of_zeros(pool):
    for multimodal, text in pool.run(2, tower_gradients, True):
        assert multimodal > 0 and text == 0
    for _, text in pool.run(2, tower_gradients, False):
        assert text > 0  # what the step before has left


def norms(config: RunConfig, forget_scatter: bool) -> tuple[float, float]:
    """The norm of the step's gradients, and that of all gradients in fp64."""
    replica = build(config)
    reduce_scatter, squares = zero1.reduce_scatter_single, []

    def noted(part: Tensor, flat: Tensor, **options) -> dist.Work:
        summed = flat.double()
        dist.all_reduce(summed)
        squares.append((summed / replica.mesh.dp.size).square().sum().item())
        return dist.barrier(async_op=True) if forget_scatter else reduce_scatter(part, flat, **options)

    with mock.patch.object(zero1, "reduce_scatter_single", noted):
        replica.pipeline.train(step_batch(0, config, replica.mesh))
        replica.engine.step()
    return replica.engine.get_global_grad_norm().item(), sum(squares) ** 0.5


def test_the_norm_is_that_of_all_gradients(pool):
    for ours, expected in pool.run(2, norms, DP, False):
        assert ours == pytest.approx(expected, rel=1e-6)  # measured 2e-8
    for ours, expected in pool.run(2, norms, DP, True):
        assert abs(ours / expected - 1) > 0.1


@dataclass(frozen=True)
class Events:
    """What happens in the passes of a step.

    order:     name of a parameter for each gradient of it, index of an optimizer group for each reduction that starts
    reduced:   indices of the groups in the order of their reductions, those after the passes too
    groups:    names of the parameters of each group, without anchors and spacers
    grad_norm: of the step
    """

    order: list[str | int]
    reduced: list[int]
    groups: list[list[str]]
    grad_norm: float

    @property
    def within(self) -> int:
        """How many reductions start within the passes."""
        return sum(isinstance(each, int) for each in self.order)

    def last_gradient(self, name: str) -> int:
        """Its place in the order."""
        return len(self.order) - 1 - self.order[::-1].index(name)


def events(config: RunConfig, announce: bool = True) -> list[Events]:
    """Of a multimodal step and a text step."""
    replica = build(config)
    optimizer = replica.engine.optimizer
    names = {parameter: name for stage in replica.stages for name, parameter in stage.vlm.named_parameters()}
    groups = [[names[each] for each in group if each in names] for group in optimizer.bf16_groups]
    flats = {flat.data_ptr(): index for index, flat in enumerate(optimizer.fp32_groups_gradients_flat)}
    accumulate, reduce_scatter, order = optimizer._update_hp_grad, zero1.reduce_scatter_single, []

    def noted_gradient(parameter: nn.Parameter, *args, **kwargs) -> None:
        order.extend([names[parameter]] if parameter in names else [])
        accumulate(parameter, *args, **kwargs)

    def noted_reduction(part: Tensor, flat: Tensor, **options) -> dist.Work:
        order.append(flats[flat.data_ptr()])
        return reduce_scatter(part, flat, **options)

    optimizer._update_hp_grad = noted_gradient
    if not announce:
        replica.pipeline._expect_last = lambda parameters: None
    found = []
    with mock.patch.object(zero1, "reduce_scatter_single", noted_reduction):
        for step in (MULTIMODAL, TEXT):
            order.clear()
            replica.pipeline.train(step_batch(step, config, replica.mesh))
            passes = [*order]
            replica.engine.step()
            reduced = [each for each in order if isinstance(each, int)]
            found.append(Events(passes, reduced, groups, replica.engine.get_global_grad_norm().item()))
    return found


PIPELINE = run_config(
    4,
    model=VL2["base"],
    train={"precision": "bf16", "micro_batch": 3},
    parallel={"pipeline": 2, "schedule": "interleaved", "virtual_stages": 3},
)
MULTIMODAL, TEXT = 0, 1
UNREAD_IN_TEXT = ("stem.siglip", "stem.sam", "stem.adaptor", "stem.newline", "stem.separator")


def block_of(name: str) -> int | None:
    match name.split("."):
        case ["blocks", block, *_]:
            return int(block)
    return None


def block_before(found: Events, index: int) -> str | None:
    """The output weight of attention in the rank's block before a group; None if the group has a part of its first
    block, or of the stem."""
    first = block_of(found.groups[index][0]) if found.groups[index] else None
    attention = {name for name in found.order if isinstance(name, str) and name.endswith("attn.o_proj.weight")}
    before = [name for name in attention if first is not None and block_of(name) < first]
    return max(before, key=block_of, default=None)


@pytest.mark.parametrize("config", [DP, EXPERTS, PIPELINE], ids=["dp", "experts", "pipeline"])
def test_a_group_is_reduced_while_earlier_blocks_compute(pool, config):
    for of_rank in pool.run(2 * config.parallel.pipeline, events, config):
        for found, unread in zip(of_rank, ((), UNREAD_IN_TEXT), strict=True):
            assert found.reduced == sorted(found.reduced, reverse=True)
            before = {index: block_before(found, index) for index in found.reduced}
            hidden = {index: name for index, name in before.items() if name is not None}
            assert len(hidden) > 1
            for index, name in hidden.items():
                assert found.order.index(index) < found.last_gradient(name)
            complete = [not any(name.startswith(unread) for name in found.groups[index]) for index in found.reduced]
            # A group without some gradient is reduced after the passes, and so are those that come after it.
            assert found.within == [*complete, False].index(False)


def test_without_announcements_nothing_is_reduced_before_the_end(pool):
    announced, other = (pool.run(2, events, DP, announce) for announce in (True, False))
    for ours, theirs in zip(announced[0] + announced[1], other[0] + other[1], strict=True):
        assert ours.within > 1 and theirs.within == 0
        assert (ours.reduced, ours.grad_norm) == (theirs.reduced, theirs.grad_norm)


def late_gradient(announce_at_once: bool) -> tuple[int, int, float]:
    """Of a parameter of the last group, which gets one more gradient after the passes: reductions that start in the
    passes and with this gradient, and the largest error of the sum on this rank."""
    replica = build(DP)
    optimizer, pipeline = replica.engine.optimizer, replica.pipeline
    group, index = len(optimizer.bf16_groups) - 1, 0
    late, announce = optimizer.bf16_groups[group][index], pipeline._expect_last
    if not announce_at_once:
        pipeline._expect_last = lambda parameters: announce(each for each in parameters if each is not late)
    with mock.patch.object(zero1, "reduce_scatter_single", wraps=zero1.reduce_scatter_single) as reduce_scatter:
        pipeline.train(step_batch(0, DP, replica.mesh))
        within = reduce_scatter.call_count
        expected = 2 * optimizer.fp32_groups_gradients[group][index]
        announce([late])
        late.backward(expected.view_as(late).to(late.dtype) / 2)
        started = reduce_scatter.call_count - within
    optimizer.reduce_gradients(pipeline_parallel=False)
    dist.all_reduce(expected)
    held = late._hp_mapping
    if held is None:
        return within, started, 0.0
    address = held.lp_fragment_address
    ours = optimizer.fp32_groups_gradients[group][index].narrow(0, address.start, address.numel)
    expected = expected.narrow(0, address.start, address.numel)
    return within, started, ((ours - expected).abs().max() / expected.abs().max()).item()


def test_a_parameter_that_is_not_announced_delays_its_group(pool):
    for within, started, error in pool.run(2, late_gradient, False):
        assert within == 0 and started > 10 and error < 5e-3  # one gradient of two is rounded to bf16


def test_a_gradient_after_the_last_one_is_refused(pool):
    with pytest.raises(AssertionError, match="The group is being reduced, so this gradient would be lost"):
        pool.run(2, late_gradient, True)
