"""ZeRO-1 in bf16: kernels, bytes and messages of accumulation and step; the norm."""

from collections import Counter
from unittest import mock

import pytest
import torch
import torch.distributed as dist
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
    """What the engine's step does after the passes of a step, and the norm that the gradients have."""
    replica = build(config)
    optimizer = replica.engine.optimizer
    replica.pipeline.train(step_batch(0, config, replica.mesh))
    messages = Counter()

    def noting(name: str, called):
        def noted(*args, **kwargs):
            messages[name] += args[-1].numel() if name != "all_reduce" else args[0].numel()
            return called(*args, **kwargs)

        return noted

    with (
        mock.patch.object(zero1, "reduce_scatter_single", noting("reduce_scatter", zero1.reduce_scatter_single)),
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
    parameter, total = optimizer.bf16_groups[0][0], optimizer.fp32_groups_gradients[0][0]
    total.fill_(7)
    watches = []
    for micro_batch in (1, 2):
        parameter.grad = torch.ones_like(parameter)
        with Watch() as watch:
            optimizer.accumulate_hp_grads_and_remove_lp(parameter, 0, 0)
        assert parameter.grad is None and torch.equal(total, torch.full_like(total, micro_batch))
        watches.append((watch.calls, watch.largest_fp32))
    return watches


def test_a_gradient_is_added_without_a_copy_in_fp32(pool):
    ((first, second),) = pool.run(1, watched_accumulation)
    for (calls, largest_fp32), kernel in ((first, "copy_"), (second, "add_")):
        assert calls[kernel] == 1 and calls["copy_"] + calls["add_"] == 1 and largest_fp32 == 0


def tower_gradients(reduce: bool) -> list[float]:
    """The largest gradient of the towers in the buffers, after a multimodal step and in the text step that follows."""
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
    for number, kind in enumerate(("multimodal", "text")):
        batch = step_batch(number, config, replica.mesh)
        assert batch.kind == kind
        replica.pipeline.train(batch)
        if reduce:
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
    optimizer = replica.engine.optimizer
    replica.pipeline.train(step_batch(0, config, replica.mesh))
    summed = [flat.double().clone() for flat in optimizer.fp32_groups_gradients_flat]
    for flat in summed:
        dist.all_reduce(flat)
    expected = sum((flat / replica.mesh.dp.size).square().sum().item() for flat in summed) ** 0.5
    if forget_scatter:
        zero1.reduce_scatter_single = lambda *_, **__: None
    replica.engine.step()
    return replica.engine.get_global_grad_norm().item(), expected


def test_the_norm_is_that_of_all_gradients(pool):
    for ours, expected in pool.run(2, norms, DP, False):
        assert ours == pytest.approx(expected, rel=1e-6)  # measured 2e-8
    for ours, expected in pool.run(2, norms, DP, True):
        assert abs(ours / expected - 1) > 0.1
