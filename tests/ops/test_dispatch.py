"""Which implementation serves each op, where, and why. Stand-ins play packages that this machine lacks, so that the
choice itself and the arguments that the kernels get are tested on any machine."""

import subprocess
import sys
from types import ModuleType
from typing import get_args

import pytest
import torch
import torch.nn.functional as F

from megavl.config.run import OpsConfig
from megavl.ops.activation import swiglu
from megavl.ops.attention import reference_attention
from megavl.ops.candidates import CANDIDATES, REFERENCE
from megavl.ops.dispatch import AUTO, OpsError, choose
from megavl.ops.expert_mlp import ComposedExpertMlp
from megavl.ops.grouped import Groups, reference_grouped_linear
from megavl.ops.norm import add_rms_norm, rms_norm
from megavl.ops.permutation import REFERENCE_PERMUTATION
from megavl.ops.trial import Result
from tests.ops.hopper import hopper

CUDA = torch.device("cuda")


def qkv(dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    cu_seqlens = torch.tensor([0, 3, 7], dtype=torch.int32)
    return *(torch.randn(7, heads, 8, generator=generator).to(dtype) for heads in (4, 2, 2)), cu_seqlens, (3, 4)


def stand_in(monkeypatch, name: str, **attributes) -> None:
    module = ModuleType(name)
    for attribute, value in attributes.items():
        setattr(module, attribute, value)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def bare_gpu():
    """A Hopper GPU without flash-attn, apex, grouped_gemm and triton."""
    with hopper():
        yield


def test_cpu_is_served_by_torch():
    ops = choose(torch.device("cpu"))
    assert ops.attention is reference_attention
    assert ops.rms_norm is rms_norm
    assert ops.grouped_linear is reference_grouped_linear
    assert [line.split(":")[0] for line in ops.lines] == [
        "attention",
        "rms_norm",
        "swiglu",
        "rotary",
        "cross_entropy",
        "router",
        "permutation",
        "grouped_linear",
        "expert_mlp",
        "matrix products",
    ]
    assert "cpu" in ops.lines[0]


@pytest.mark.parametrize(("dtype", "fused"), [(torch.bfloat16, True), (torch.float32, False)])
def test_flash_attn_serves_half_precision(bare_gpu, monkeypatch, dtype, fused):
    calls = []

    def flash_attn_varlen_func(q, k, v, cu_q, cu_k, longest_q, longest_k, causal):
        calls.append((longest_q, longest_k, causal, cu_q is cu_k))
        return reference_attention(q, k, v, cu_q, (3, 4))

    stand_in(monkeypatch, "flash_attn", flash_attn_varlen_func=flash_attn_varlen_func)
    ops = choose(CUDA)
    assert "flash-attn" in ops.lines[0]
    assert torch.equal(ops.attention(*qkv(dtype)), reference_attention(*qkv(dtype)))
    assert calls == ([(4, 4, True, True)] if fused else [])


def test_torch_varlen_serves_without_flash_attn(bare_gpu, monkeypatch):
    calls = []

    def varlen_attn(q, k, v, cu_q, cu_k, longest_q, longest_k, *, window_size, enable_gqa):
        calls.append((longest_q, longest_k, window_size, enable_gqa))
        return reference_attention(q, k, v, cu_q, (3, 4))

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    ops = choose(CUDA)
    assert "varlen_attn" in ops.lines[0]
    assert "flash_attn: does not import" in ops.lines[0]
    ops.attention(*qkv(torch.bfloat16))
    ops.attention(*qkv(torch.float32))
    assert calls == [(4, 4, (-1, 0), True)]


def test_reference_serves_a_torch_without_varlen(bare_gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
    ops = choose(CUDA)
    assert ops.attention is reference_attention
    assert "flash_attn" in ops.lines[0]


def test_reference_serves_an_old_gpu(bare_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    ops = choose(CUDA)
    assert ops.attention is reference_attention
    assert "Stand-in" in ops.lines[0]


def test_apex_serves_the_norm_only_with_its_extension(bare_gpu, monkeypatch):
    calls = []

    def fused_rms_norm_affine(x, weight, shape, eps):
        calls.append((tuple(shape), eps))
        return rms_norm(x, weight, eps)

    for name in ("apex", "apex.normalization"):
        stand_in(monkeypatch, name)
    stand_in(monkeypatch, "apex.normalization.fused_layer_norm", fused_rms_norm_affine=fused_rms_norm_affine)
    assert choose(CUDA).rms_norm is rms_norm

    stand_in(monkeypatch, "fused_layer_norm_cuda")
    ops = choose(CUDA)
    x, weight = torch.randn(3, 8), torch.randn(8)
    assert torch.equal(ops.rms_norm(x, weight, 1e-6), rms_norm(x, weight, 1e-6))
    assert all(map(torch.equal, ops.add_rms_norm(x, x, weight, 1e-6), add_rms_norm(x, x, weight, 1e-6)))
    assert calls == [((8,), 1e-6)] * 2
    assert "apex" in ops.lines[1]


@pytest.mark.parametrize(
    ("capability", "words"),
    [((8, 0), "Stand-in is neither Hopper nor Blackwell"), ((9, 0), "grouped_mm"), ((10, 0), "grouped_mm")],
)
def test_grouped_products_are_torchs_where_it_has_a_kernel(bare_gpu, monkeypatch, capability, words):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    calls = []
    monkeypatch.setattr(F, "grouped_mm", lambda x, weight, offs: calls.append(offs.tolist()) or x @ weight[0])
    ops = choose(CUDA)
    assert words in next(line for line in ops.lines if line.startswith("grouped_linear"))
    x, weight, groups = torch.randn(3, 8).bfloat16(), torch.randn(2, 16, 8).bfloat16(), Groups(torch.tensor([3, 0]))
    assert torch.equal(ops.grouped_linear(x, weight, groups), reference_grouped_linear(x, weight, groups))
    assert calls == ([] if capability == (8, 0) else [[3, 3]])


def test_torch_serves_permutations_without_triton(bare_gpu):
    ops = choose(CUDA)
    assert ops.permutation is REFERENCE_PERMUTATION
    assert any(line.startswith("permutation: torch (triton: does not import") for line in ops.lines)


def test_grouped_gemm_serves_the_gpus_that_torch_does_not(bare_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    calls = []

    def gmm(a, b, batch_sizes, trans_b):
        calls.append((batch_sizes.tolist(), batch_sizes.device.type, trans_b))
        return torch.cat([rows @ matrix.t() for rows, matrix in zip(a.split(batch_sizes.tolist()), b, strict=True)])

    stand_in(monkeypatch, "grouped_gemm")
    stand_in(monkeypatch, "grouped_gemm.ops", gmm=gmm)
    ops = choose(CUDA)
    assert "grouped_gemm" in next(line for line in ops.lines if line.startswith("grouped_linear"))
    groups = Groups(torch.tensor([1, 0, 2]))
    for dtype, calls_then in ((torch.float32, []), (torch.bfloat16, [([1, 0, 2], "cpu", True)])):
        x, weight = torch.randn(3, 8).to(dtype), torch.randn(3, 16, 8).to(dtype)
        assert torch.equal(ops.grouped_linear(x, weight, groups), reference_grouped_linear(x, weight, groups))
        assert calls == calls_then


@pytest.fixture
def triton_gpu(bare_gpu, monkeypatch):
    """The same GPU with a package called triton, and stand-ins for the kernels, which need the real one."""
    stand_in(monkeypatch, "triton", __version__="0")
    for file, name in (
        ("norm", "TRITON_NORMS"),
        ("activation", "fused_swiglu"),
        ("rope", "TRITON_ROTARY"),
        ("cross_entropy", "TRITON_CROSS_ENTROPY"),
        ("permutation", "TRITON_PERMUTATION"),
    ):
        stand_in(monkeypatch, f"megavl.ops.kernels.{file}", **{name: StandIn()})
    stand_in(monkeypatch, "megavl.ops.kernels.grouped", grouped_linear=StandIn(), expert_mlp=StandIn())


class StandIn:
    """Any of the kernels' dataclasses, whose fields are itself."""

    def __getattr__(self, name):
        return self


def test_triton_serves_where_it_imports(triton_gpu):
    ops = choose(CUDA)
    fields = ("rms_norm", "add_rms_norm", "swiglu", "rotate_halves", "rotate_latent", "cross_entropy", "permutation")
    for field in fields:
        assert isinstance(getattr(ops, field), StandIn), field
    assert "rms_norm: Triton kernels, with the residual addition" in ops.lines


@pytest.mark.parametrize(("capability", "products"), [((8, 0), True), ((9, 0), False), ((10, 0), False)])
def test_triton_serves_experts_from_ampere_on(triton_gpu, monkeypatch, capability, products):
    """Their whole layer everywhere, single products where torch has no kernel."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    ops = choose(CUDA)
    assert isinstance(ops.expert_mlp, StandIn) and isinstance(ops.grouped_linear, StandIn) == products
    assert sum("Triton kernels for bf16" in line for line in ops.lines) == 1 + products


def test_triton_needs_ampere(triton_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    ops = choose(CUDA)
    assert ops.rms_norm is rms_norm and "triton: needs Ampere, Stand-in is older" in ops.lines[1]


def test_a_candidate_can_be_forced(triton_gpu):
    ops = choose(CUDA, OpsConfig(rms_norm="torch", swiglu="triton"))
    assert ops.rms_norm is rms_norm and ops.add_rms_norm is add_rms_norm and isinstance(ops.swiglu, StandIn)
    assert "rms_norm: torch (forced by ops.rms_norm)" in ops.lines


def test_compiled_blocks_get_what_can_be_fused(triton_gpu):
    """But not the routed experts, which are not compiled, and not in place of what is forced."""
    plain, ops = choose(CUDA), choose(CUDA, [("rotary", "triton")], compiles=True)
    assert ops.rms_norm is rms_norm is not plain.rms_norm and ops.swiglu is swiglu is not plain.swiglu
    assert "swiglu: torch (compiled with its neighbours)" in ops.lines
    assert ops.rotate_halves is plain.rotate_halves
    assert ops.expert_mlp is plain.expert_mlp


def test_what_is_forced_must_be_available(triton_gpu):
    with pytest.raises(OpsError) as refused:
        choose(CUDA, OpsConfig(rms_norm="apex", attention="flash_attn"))
    apex, attention = sorted(str(refused.value).splitlines(), reverse=True)
    assert apex.startswith("ops.rms_norm = apex cannot serve this run: does not import: ")
    assert apex.endswith("; available are triton, torch, auto")
    assert attention.startswith("ops.attention = flash_attn")
    with pytest.raises(OpsError, match="needs CUDA, the device is cpu"):
        choose(torch.device("cpu"), OpsConfig(swiglu="triton"))


def test_the_configuration_knows_the_candidates():
    assert {op: set(get_args(field.annotation)) for op, field in OpsConfig.model_fields.items()} == {
        op: {AUTO, *(candidate.name for candidate in candidates)} for op, candidates in CANDIDATES.items()
    }
    for candidates in CANDIDATES.values():
        assert candidates[-1].name == REFERENCE


def test_the_trial_chooses(triton_gpu):
    """The fastest of those that are right; ops that are forced are not tried."""
    asked = {}
    results = {
        "rms_norm": [Result("triton", 2e-4), Result("torch", 1e-3)],
        "rotary": [Result("triton", 2e-3), Result("torch", 1e-3)],
        "cross_entropy": [Result("triton", 1e-4, "result 3 is off by 1"), Result("torch", 1e-3)],
    }

    def trial(implementations, parts):
        asked.update({op: list(names) for op, names in implementations.items()})
        return results

    ops = choose(CUDA, {"swiglu": "torch", "rotary": "auto"}.items(), trial)
    assert (
        "swiglu" not in asked
        and asked["rms_norm"] == ["triton", "torch"]
        and asked["permutation"] == ["triton", "torch"]
    )
    assert ops.lines[1] == (
        "rms_norm: Triton kernels, with the residual addition (triton: 0.2 ms forward and backward; torch: 1 ms "
        "forward and backward; apex: does not import: import of fused_layer_norm_cuda halted; None in sys.modules)"
    )
    assert ops.lines[3].startswith("rotary: torch (torch: 1 ms forward and backward; triton: 2 ms")
    assert ops.lines[4].startswith(
        "cross_entropy: torch (torch: 1 ms forward and backward; triton: result 3 is off by 1"
    )


@pytest.mark.parametrize(
    ("seconds", "forced", "fused"),
    [((2e-4, 1e-3), {}, True), ((1e-3, 2e-4), {}, False), ((1e-3, 2e-4), {"expert_mlp": "triton"}, True)],
    ids=["faster", "slower", "forced"],
)
def test_the_layer_of_the_experts_is_tried_with_the_chosen_parts(triton_gpu, seconds, forced, fused):
    """On a Hopper GPU torch's grouped products beside the kernel that has the whole layer."""
    tried, made_of = {}, {}
    results = {
        "grouped_linear": [Result("grouped_mm", 2e-3), Result("triton", 1e-3), Result("torch", 3e-3)],
        "expert_mlp": [Result(name, time) for name, time in zip(("triton", "torch"), seconds, strict=True)],
    }

    def trial(implementations, parts):
        tried.update(implementations)
        made_of.update(dict.fromkeys(implementations, tuple(parts)))
        return {op: results[op] for op in implementations if op in results}

    ops = choose(CUDA, {"swiglu": "torch", **forced}.items(), trial)
    assert made_of["grouped_linear"] == () and "swiglu" not in tried
    assert isinstance(ops.expert_mlp, StandIn) == fused
    if forced:
        assert "expert_mlp" not in tried
        return
    assert made_of["expert_mlp"] == ("triton", "torch")
    assert ops.expert_mlp is tried["expert_mlp"]["triton" if fused else "torch"]
    assert tried["expert_mlp"]["torch"] == ComposedExpertMlp(ops.grouped_linear, swiglu)


@pytest.mark.parametrize(
    ("results", "reason"),
    [
        ([Result("triton", None, "RuntimeError: no compiler"), Result("torch", 1e-3)], "triton: RuntimeError"),
        (
            [Result(name, None, "the reference cannot be tried: OutOfMemoryError") for name in ("triton", "torch")],
            "OutOf",
        ),
        # Of a process that has another installation.
        ([Result("torch", None)], ""),
        ([Result("apex", 1e-4), Result("torch", 1e-3)], "1 ms"),
    ],
)
def test_the_reference_serves_where_no_kernel_can(triton_gpu, results, reason):
    ops = choose(CUDA, (), lambda implementations, parts: {"rms_norm": results})
    assert ops.rms_norm is rms_norm and reason in ops.lines[1]


def test_a_cpu_needs_no_triton():
    program = """
import sys
sys.modules["triton"] = None
import torch
from megavl.ops.dispatch import choose
choose(torch.device("cpu"))
assert not any(name.startswith("megavl.ops.kernels") for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True)
