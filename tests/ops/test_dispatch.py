"""What serves each op where. Packages that this machine lacks are played by stand-ins, so that the choice itself and
the arguments that the kernels get are tested on any machine."""

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from megavl.ops.attention import reference_attention
from megavl.ops.dispatch import choose
from megavl.ops.grouped import Groups, reference_grouped_linear
from megavl.ops.norm import rms_norm
from megavl.ops.permutation import REFERENCE_PERMUTATION
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
    """A Hopper GPU without flash-attn, apex and grouped_gemm."""
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
        "rotary positions",
        "cross entropy",
        "permutation of experts' rows",
        "SwiGLU of experts",
        "products of experts",
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
    assert "flash-attn does not import" in ops.lines[0]
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
    assert calls == [((8,), 1e-6)]
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
    assert words in next(line for line in ops.lines if line.startswith("products of experts"))
    x, weight, groups = torch.randn(3, 8).bfloat16(), torch.randn(2, 16, 8).bfloat16(), Groups(torch.tensor([3, 0]))
    assert torch.equal(ops.grouped_linear(x, weight, groups), reference_grouped_linear(x, weight, groups))
    assert calls == ([] if capability == (8, 0) else [[3, 3]])


@pytest.mark.parametrize(("capability", "fused"), [((8, 0), True), ((9, 0), False), ((10, 0), False)])
def test_triton_serves_experts_on_ampere_and_permutations_everywhere(bare_gpu, monkeypatch, capability, fused):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    permutation, grouped_linear, expert_mlp = object(), object(), object()
    stand_in(monkeypatch, "triton")
    stand_in(monkeypatch, "megavl.ops.kernels.permutation", TRITON_PERMUTATION=permutation)
    stand_in(monkeypatch, "megavl.ops.kernels.grouped", grouped_linear=grouped_linear, expert_mlp=expert_mlp)
    ops = choose(CUDA)
    assert ops.permutation is permutation
    assert (ops.grouped_linear is grouped_linear) == (ops.expert_mlp is expert_mlp) == fused
    assert sum("Triton kernels for bf16" in line for line in ops.lines) == 2 * fused
    assert choose(torch.device("cpu")).permutation is REFERENCE_PERMUTATION


def test_torch_serves_permutations_without_triton(bare_gpu):
    ops = choose(CUDA)
    assert ops.permutation is REFERENCE_PERMUTATION
    assert any("triton does not import" in line for line in ops.lines)


def test_grouped_gemm_serves_the_gpus_that_torch_does_not(bare_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    calls = []

    def gmm(a, b, batch_sizes, trans_b):
        calls.append((batch_sizes.tolist(), batch_sizes.device.type, trans_b))
        return torch.cat([rows @ matrix.t() for rows, matrix in zip(a.split(batch_sizes.tolist()), b, strict=True)])

    stand_in(monkeypatch, "grouped_gemm")
    stand_in(monkeypatch, "grouped_gemm.ops", gmm=gmm)
    ops = choose(CUDA)
    assert "grouped_gemm" in next(line for line in ops.lines if line.startswith("products of experts"))
    groups = Groups(torch.tensor([1, 0, 2]))
    for dtype, calls_then in ((torch.float32, []), (torch.bfloat16, [([1, 0, 2], "cpu", True)])):
        x, weight = torch.randn(3, 8).to(dtype), torch.randn(3, 16, 8).to(dtype)
        assert torch.equal(ops.grouped_linear(x, weight, groups), reference_grouped_linear(x, weight, groups))
        assert calls == calls_then
