"""Topologies with the operators of a GPU: each trains as one process with torch's operators does.

The kernels run in Triton's interpreter; torch's variable-length attention and its product of bf16 in fp32, which have
no CPU kernel, have stand-ins. Few packs and steps: an interpreted program takes about a millisecond.
"""

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from megavl.config.run import RunConfig
from megavl.ops import candidates
from megavl.ops.attention import reference_attention
from megavl.ops.dispatch import choose
from tests.models import changed
from tests.ops.kernels.interpreter import kernels, repair_interpreter
from tests.ops.kernels.test_norm import MISTAKES
from tests.ops.test_router import wide_product
from tests.runtime.cases import CPU, MODEL, VL2, Trained, run_config, train
from tests.runtime.test_topologies import by_world, check_loads, compare

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")

# Head widths are multiples of 8, and so are those of the experts after a cut: the kernels of torch need it.
_DECODER = {"layers": 2, "width": 32, "heads": 4, "kv_heads": 4}
MODELS = {
    "vl": changed(MODEL, decoder=_DECODER),
    "tiny": changed(VL2["tiny"], decoder=_DECODER),
    # Values narrower than keys, which the fused attention fills up.
    "small": changed(VL2["small"], decoder=_DECODER | {"mla": {"nope_width": 16, "rope_width": 8, "value_width": 16}}),
}
# The kernel, or the stand-in, that shows that a candidate serves.
SHOWN_BY = {
    ("attention", "varlen_attn"): "varlen_attn",
    ("rms_norm", "triton"): "norm.forward_kernel",
    ("swiglu", "triton"): "activation.forward_kernel",
    ("rotary", "triton"): "rope.rotate_kernel",
    ("cross_entropy", "triton"): "cross_entropy.statistics_kernel",
    ("router", "mm"): "wide_mm",
    ("permutation", "triton"): "permutation.combine_kernel",
    ("grouped_linear", "triton"): "grouped.product_kernel",
    ("grouped_linear", "grouped_mm"): "grouped_mm",
    ("expert_mlp", "triton"): "grouped.gate_up_kernel",
}
DENSE = {"rms_norm": "triton", "swiglu": "triton", "cross_entropy": "triton"}
ROTARY = {"rotary": "triton"}
EXPERTS = {"router": "mm", "permutation": "triton", "expert_mlp": "triton"}
GROUPED = {"grouped_linear": "triton", "swiglu": "triton"}
ATTENTION = {"attention": "varlen_attn"}


@dataclass(frozen=True)
class Case:
    """packs: of each of the steps"""

    world: int
    model: str
    parallel: dict
    ops: dict
    precision: str = "fp32"
    packs: int = 2
    steps: int = 1
    recompute: str = "off"

    def __str__(self) -> str:
        sizes = " ".join(f"{key}={value}" for key, value in ({"world": self.world} | self.parallel).items())
        ops = ",".join(self.ops) or "torch"
        return f"{self.model} {sizes} {ops} {self.precision} {self.packs}x{self.steps} recompute={self.recompute}"

    @property
    def alone(self) -> "Case":
        """The same run in a single process, with torch's operators."""
        return Case(1, self.model, {}, {}, self.precision, self.packs, self.steps)

    @property
    def config(self) -> RunConfig:
        return run_config(
            self.world,
            model=MODELS[self.model],
            optim={"lr": 1e-3 if self.precision == "bf16" else 1e-2},
            train={
                "steps": self.steps,
                "global_batch": self.packs,
                "precision": self.precision,
                "recompute": self.recompute,
            },
            parallel=self.parallel,
            balance={} if self.model == "vl" else {"auxiliary_weight": 0.5},
            ops=self.ops,
        )


IN_FP32 = [
    Case(1, "vl", {}, DENSE | ROTARY, packs=1),
    Case(2, "vl", {"tensor": 2, "sequence": True}, DENSE | ROTARY, packs=1),
    Case(2, "vl", {"pipeline": 2}, DENSE, steps=2, recompute="selective"),
    Case(1, "small", {}, ROTARY, packs=1),
    Case(2, "small", {"tensor": 2, "sequence": True}, ROTARY | {"permutation": "triton"}, packs=1),
    Case(2, "tiny", {"expert": 2}, {"permutation": "triton", "rms_norm": "triton"}),
]
IN_BF16 = [
    Case(2, "vl", {"zero": 1}, DENSE | ROTARY | ATTENTION, "bf16"),
    Case(1, "tiny", {}, DENSE | EXPERTS, "bf16", packs=1),
    Case(2, "tiny", {"expert": 2}, EXPERTS | ATTENTION, "bf16", steps=2, recompute="selective"),
    Case(1, "small", {}, GROUPED, "bf16", packs=1),
    Case(2, "small", {"expert": 2}, GROUPED, "bf16"),
    Case(2, "tiny", {"tensor": 2, "expert_width": "cut"}, {"grouped_linear": "grouped_mm"}, "bf16", steps=2),
    Case(1, "small", {}, ATTENTION, "bf16", steps=2),
    Case(2, "small", {"tensor": 2, "sequence": True}, ATTENTION, "bf16", steps=2),
]


@dataclass(frozen=True)
class Shown(Trained):
    """shown: names of the kernels that this rank launched, and of the stand-ins that it called"""

    shown: frozenset[str]


def train_with_a_mistake(config: RunConfig) -> Shown:
    repair_interpreter()
    wrong = kernels("norm", MISTAKES["no projection"]).TRITON_NORMS
    with mock.patch("megavl.ops.kernels.norm.TRITON_NORMS", wrong):
        return _train(config)


def train_with_kernels(configs: list[RunConfig]) -> list[Shown]:
    repair_interpreter()
    return [_train(config) for config in configs]


def _train(config: RunConfig) -> Shown:
    with gpu() as shown:
        trained = train(config, ops=choose(CPU, ((op, "torch" if name == "auto" else name) for op, name in config.ops)))
    return Shown(**vars(trained), shown=frozenset(shown))


@contextmanager
def gpu() -> Iterator[set[str]]:
    """While entered, a CPU has the candidates of a Hopper GPU. Yields the names for `Shown`."""
    from triton.runtime.interpreter import GridExecutor

    shown, launch, multiply = set(), GridExecutor.__call__, F.grouped_mm

    def recorded(executor, *args, **kwargs):
        shown.add(f"{executor.fn.__module__.removeprefix('megavl.ops.kernels.')}.{executor.fn.__name__}")
        return launch(executor, *args, **kwargs)

    def varlen(q, k, v, cu_q, cu_k, longest_q, longest_k, **_):
        shown.add("varlen_attn")
        assert q.shape[2] == k.shape[2] == v.shape[2]
        return reference_attention(q, k, v, cu_q, cu_q.diff().tolist())

    def wide_mm(left, right):
        shown.add("wide_mm")
        return wide_product(left, right)

    def grouped_mm(*args, **kwargs):
        shown.add("grouped_mm")
        return multiply(*args, **kwargs)

    with (
        mock.patch.multiple(candidates, _needs_cuda=mock.DEFAULT, _needs_ampere=mock.DEFAULT, wide_mm=wide_mm),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)),
        mock.patch("torch.nn.attention.varlen.varlen_attn", varlen),
        mock.patch.object(F, "grouped_mm", grouped_mm),
        mock.patch.object(GridExecutor, "__call__", recorded),
    ):
        yield shown


@pytest.fixture(scope="module")
def trained(request, interpreted_run) -> Callable[[Case], tuple[Shown, ...]]:
    return by_world(
        request, lambda world, cases: interpreted_run(world, train_with_kernels, [case.config for case in cases])
    )


def check_serves(trained, case: Case) -> None:
    """Every operator of a case on some rank, and none of them in its reference."""
    shown = frozenset().union(*(rank.shown for rank in trained(case)))
    wanted = {SHOWN_BY[choice] for choice in case.ops.items()}
    if case.model == "small" and "rotary" in case.ops:
        wanted = wanted - {"rope.rotate_kernel"} | {"latent.forward_kernel"}
    assert wanted <= shown, (wanted - shown, shown)
    assert not trained(case.alone)[0].shown


@pytest.mark.parametrize("case", IN_FP32, ids=str)
def test_fp32_equals_one_process_with_torch(trained, record_property, case):
    loss, norm, weights, _ = compare(trained, case, record_property)
    check_serves(trained, case)
    assert loss < 1e-6  # measured 1.0e-7
    assert norm < 2e-6  # measured 1.7e-7
    assert weights < 5e-6  # measured 2.5e-7, of weights up to 1
    check_loads(trained, case)


@pytest.mark.parametrize("case", IN_BF16, ids=str)
def test_bf16_equals_one_process_with_torch_within_its_rounding(trained, record_property, case):
    loss, norm, *_ = compare(trained, case, record_property)
    check_serves(trained, case)
    assert loss < 5e-4  # measured 6.8e-5
    assert norm < 2e-2  # measured 3.0e-3


def test_a_mistake_in_a_kernel_is_noticed(interpreted_run, record_property):
    case = Case(2, "vl", {"tensor": 2, "sequence": True}, {"rms_norm": "triton"}, packs=1)
    results = {
        str(case): interpreted_run(case.world, train_with_a_mistake, case.config),
        str(case.alone): interpreted_run(1, _train, case.alone.config),
    }
    loss, norm, weights, _ = compare(lambda each: results[str(each)], case, record_property)
    assert loss < 1e-6  # the mistake is in the backward pass
    assert norm > 1e-2 and weights > 1e-3  # measured 1.1e-1 and 2.0e-2
