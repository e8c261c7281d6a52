"""Weights that share an input lie end to end in DeepSpeed's flat bf16 buffers, so they are multiplied as one."""

from collections.abc import Iterator
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from megavl.config.run import RunConfig
from megavl.model.attention import Attention
from megavl.model.mlp import Mlp
from megavl.parallel import linear
from megavl.parallel.collectives import enter_parallel
from megavl.parallel.groups import TensorAxis
from megavl.parallel.linear import ColumnLinear, column_linears
from tests.models import changed
from tests.runtime.cases import MODEL, VL2, build, run_config, step_batch

TOKENS = 12
# Keys and values of 4 heads for the queries of 12.
GROUPED = changed(MODEL, decoder={"kv_heads": 4})
MODELS = {"vl": MODEL, "grouped": GROUPED} | VL2
BF16 = {"precision": "bf16", "micro_batch": 6}
# Relative to the largest value of a tensor, measured: 4e-3 on one tensor rank, where a product is rounded to bf16 once;
# 6e-3 where the gradient of the input is summed over two ranks; 7e-3 where it is summed over separate products.
TOLERANCE = 1.2e-2


def of(world: int, model: str, train: dict = BF16, **changes) -> RunConfig:
    optim = changes.pop("optim", None)
    return run_config(world, model=MODELS[model], train=train, parallel=changes, optim=optim)


JOINT = {
    1: [of(1, model, zero=zero) for model in ("vl", "tiny", "base") for zero in (1, 2)] + [of(1, "grouped")],
    2: [
        of(2, "vl", zero=2),
        of(2, "grouped", tensor=2),
        of(2, "grouped", tensor=2, sequence=True),
        of(2, "small", tensor=2, sequence=True),
        of(2, "base", expert=2),
        of(2, "vl", pipeline=2, schedule="interleaved", virtual_stages=2),
    ],
}
FROZEN = {"rules": [{"match": r"up_proj|k_proj", "lr_multiplier": 0.0}]}
OTHER_GROUPS = {"rules": [{"match": r"up_proj|k_proj", "lr_multiplier": 0.5}]}
SEPARATE = {
    1: [of(1, "vl", {}, zero=0), of(1, "tiny", optim=FROZEN), of(1, "vl", optim=OTHER_GROUPS)],
    2: [of(2, "vl", {"micro_batch": 6}, zero=0)],
}


@dataclass(frozen=True)
class Found:
    """Of one layer: products forward and backward, weights, and the worst relative error of outputs and gradients."""

    layer: str
    forward: int
    backward: int
    weights: int
    error: float


class Products(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.count += operator is torch.ops.aten.mm.default
        return operator(*args, **(kwargs or {}))


def layers_of(stages: nn.ModuleList) -> Iterator[tuple[str, tuple[ColumnLinear, ...]]]:
    """The column-parallel layers that share an input."""
    for name, module in stages.named_modules():
        if isinstance(module, Attention):
            yield name, (module.q_proj, module.k_proj, module.v_proj)
        if isinstance(module, Mlp):
            yield name, (module.gate_proj, module.up_proj)


def exact(x: Tensor, weights: list[Tensor], tp: TensorAxis) -> list[Tensor]:
    x = enter_parallel(x, tp)  # [T, d_in]
    return [F.linear(x, weight) for weight in weights]


def compared(name: str, layers: tuple[ColumnLinear, ...]) -> Found:
    weights, tp = [layer.weight for layer in layers], layers[0].tp
    generator = torch.Generator().manual_seed(0)
    here = TOKENS // tp.size if tp.sequence else TOKENS
    x = torch.randn(here, weights[0].shape[1], generator=generator).to(weights[0].dtype).requires_grad_()
    with Products() as forward:
        outputs = column_linears(x, layers)
    upstream = [torch.randn(output.shape, generator=generator).to(output.dtype) for output in outputs]
    needed = [x, *(weight for weight in weights if weight.requires_grad)]
    with Products() as backward:
        gradients = torch.autograd.grad(outputs, needed, upstream)
    wide = [each.detach().double().requires_grad_() for each in (x, *weights)]
    expected = exact(wide[0], wide[1:], tp)
    kept = [each for each, here in zip(wide, (x, *weights), strict=True) if here.requires_grad]
    expected += torch.autograd.grad(expected, kept, [grad.double() for grad in upstream])
    return Found(name, forward.count, backward.count, len(weights), error([*outputs, *gradients], expected))


def error(found: list[Tensor], exact: list[Tensor]) -> float:
    pairs = zip(found, exact, strict=True)
    return max(((ours - value).abs().max() / value.abs().max()).item() for ours, value in pairs)


def all_compared(configs: list[RunConfig]) -> list[list[Found]]:
    """Of each run, before and after a step."""
    found = []
    for config in configs:
        replica = build(config)
        layers = list(layers_of(replica.stages))
        of_run = [compared(name, those) for name, those in layers]
        replica.step(step_batch(0, config, replica.mesh), config.optim.lr)
        of_run += [compared(name, those) for name, those in layers]
        found.append(of_run)
    return found


@pytest.mark.parametrize("world", JOINT)
def test_one_product_forward_and_two_backward(pool, world):
    for by_run in pool.run(world, all_compared, JOINT[world]):
        for config, found in zip(JOINT[world], by_run, strict=True):
            assert len(found) >= 2, config
            for each in found:
                assert (each.forward, each.backward) == (1, 2), each
                assert each.error < TOLERANCE, each


@pytest.mark.parametrize("world", SEPARATE)
def test_elsewhere_each_weight_has_its_own_products(pool, world):
    for by_run in pool.run(world, all_compared, SEPARATE[world]):
        for config, found in zip(SEPARATE[world], by_run, strict=True):
            assert len(found) >= 2, config
            for each in found:
                assert each.forward == each.weights and each.backward > 2, each
                assert each.error < TOLERANCE, each


def joint_products_of_a_step(config: RunConfig) -> int:
    """Inside of the engine's forward pass, where ZeRO-3 has gathered the weights."""
    replica = build(config)
    with mock.patch.object(linear, "split_columns", wraps=linear.split_columns) as split:
        replica.step(step_batch(0, config, replica.mesh), config.optim.lr)
    return split.call_count


@pytest.mark.parametrize(("zero", "joint"), [(2, True), (3, False)])
def test_zero3_gathers_each_weight_to_its_own_place(pool, zero, joint):
    """A joint view would keep gathered weights in memory from the forward to the backward pass."""
    assert all(bool(count) == joint for count in pool.run(2, joint_products_of_a_step, of(2, "vl", zero=zero)))
