"""Implementations of each op in order of preference, each with where it is available.

A new one is a `Candidate` in its op's list, and a word in `megavl.config.run.OpsConfig`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megavl.ops.activation import swiglu
from megavl.ops.attention import PackedAttention, fused_attention, reference_attention
from megavl.ops.cross_entropy import REFERENCE_CROSS_ENTROPY, CrossEntropy
from megavl.ops.expert_mlp import ComposedExpertMlp, ExpertMlp
from megavl.ops.grouped import GroupedLinear, grouped_gemm_linear, grouped_mm_linear, reference_grouped_linear
from megavl.ops.norm import REFERENCE_NORMS, Norms
from megavl.ops.permutation import REFERENCE_PERMUTATION, Permutation
from megavl.ops.rope import REFERENCE_ROTARY, Rotary
from megavl.ops.router import RouterLogits, reference_router_logits, wide_mm, wide_router_logits
from megavl.ops.versions import causal_varlen

# Name of every op's reference, which serves any device and is the last of its candidates.
REFERENCE = "torch"
_AMPERE = (8, 0)  # compute capability; FlashAttention 2 needs it, and the bf16 of our Triton kernels
# Major ones for which torch has a kernel of grouped products; on others its grouped_mm is a loop too.
_HOPPER, _BLACKWELL = 9, 10


class Unavailable(Exception):
    """A candidate does not serve a device; the message says why."""


@dataclass(frozen=True)
class Candidate:
    """One implementation of an op.

    name:  how the configuration calls it
    words: how a run describes it
    load:  the implementation for a device; raises Unavailable
    """

    name: str
    words: str
    load: Callable[[torch.device], Any]


def _needs_cuda(device: torch.device) -> None:
    if device.type != "cuda":
        raise Unavailable(f"needs CUDA, the device is {device}")


def _needs_ampere(device: torch.device) -> None:
    _needs_cuda(device)
    if torch.cuda.get_device_capability(device) < _AMPERE:
        raise Unavailable(f"needs Ampere, {torch.cuda.get_device_name(device)} is older")


def _does_not_import(error: ImportError) -> Unavailable:
    return Unavailable(f"does not import: {error}")


def _flash_attn(device: torch.device) -> PackedAttention:
    _needs_ampere(device)
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError as error:
        raise _does_not_import(error) from error

    def kernel(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
        return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, longest, longest, causal=True)

    return fused_attention(kernel)


def _varlen_attn(device: torch.device) -> PackedAttention:
    _needs_ampere(device)
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        raise _does_not_import(error) from error
    return fused_attention(causal_varlen(varlen_attn))


def _needs_triton(device: torch.device) -> None:
    _needs_ampere(device)
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise _does_not_import(error) from error


def _triton_norms(device: torch.device) -> Norms:
    _needs_triton(device)
    from megavl.ops.kernels.norm import TRITON_NORMS

    return TRITON_NORMS


def _triton_swiglu(device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    _needs_triton(device)
    from megavl.ops.kernels.activation import fused_swiglu

    return fused_swiglu


def _triton_rotary(device: torch.device) -> Rotary:
    _needs_triton(device)
    from megavl.ops.kernels.rope import TRITON_ROTARY

    return TRITON_ROTARY


def _triton_cross_entropy(device: torch.device) -> CrossEntropy:
    _needs_triton(device)
    from megavl.ops.kernels.cross_entropy import TRITON_CROSS_ENTROPY

    return TRITON_CROSS_ENTROPY


def _apex_norms(device: torch.device) -> Norms:
    _needs_cuda(device)
    try:
        # The compiled extension is imported for its own sake: apex itself imports without it, and fails when called.
        import fused_layer_norm_cuda  # noqa: F401
        from apex.normalization.fused_layer_norm import fused_rms_norm_affine
    except ImportError as error:
        raise _does_not_import(error) from error

    def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return fused_rms_norm_affine(x, weight, weight.shape, eps)

    def add_norm(h: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        h = h + delta
        return h, norm(h, weight, eps)

    return Norms(norm, add_norm)


def _grouped_mm(device: torch.device) -> GroupedLinear:
    _needs_cuda(device)
    major, _ = torch.cuda.get_device_capability(device)
    if major not in (_HOPPER, _BLACKWELL):
        raise Unavailable(f"{torch.cuda.get_device_name(device)} is neither Hopper nor Blackwell")
    # On Blackwell it leaves the gradient of an expert without rows unwritten (github.com/pytorch/pytorch, 172439).
    return grouped_mm_linear(clears_empty=major == _BLACKWELL)


def _grouped_gemm(device: torch.device) -> GroupedLinear:
    _needs_cuda(device)
    try:
        from grouped_gemm.ops import gmm
    except ImportError as error:
        raise _does_not_import(error) from error
    return grouped_gemm_linear(gmm)


def _router_mm(device: torch.device) -> RouterLogits:
    _needs_ampere(device)
    return wide_router_logits(wide_mm)


def _triton_permutation(device: torch.device) -> Permutation:
    _needs_triton(device)
    from megavl.ops.kernels.permutation import TRITON_PERMUTATION

    return TRITON_PERMUTATION


def _triton_grouped(device: torch.device) -> GroupedLinear:
    _needs_triton(device)
    from megavl.ops.kernels.grouped import grouped_linear

    return grouped_linear


def _triton_expert_mlp(device: torch.device) -> Callable[[GroupedLinear, Callable], ExpertMlp]:
    _needs_triton(device)
    from megavl.ops.kernels.grouped import expert_mlp

    return lambda grouped_linear, swiglu: expert_mlp


def _reference(words: str, implementation: Any) -> Candidate:
    return Candidate(REFERENCE, words, lambda device: implementation)


CANDIDATES: Mapping[str, tuple[Candidate, ...]] = {
    "attention": (
        Candidate("flash_attn", "flash-attn for fp16 and bf16, torch one document at a time for fp32", _flash_attn),
        Candidate("varlen_attn", "torch varlen_attn for fp16 and bf16, one document at a time for fp32", _varlen_attn),
        _reference("torch, one document at a time", reference_attention),
    ),
    "rms_norm": (
        Candidate("triton", "Triton kernels, with the residual addition", _triton_norms),
        Candidate("apex", "apex FusedRMSNorm", _apex_norms),
        _reference("torch", REFERENCE_NORMS),
    ),
    "swiglu": (
        Candidate("triton", "Triton kernels", _triton_swiglu),
        _reference("torch", swiglu),
    ),
    "rotary": (
        Candidate("triton", "Triton kernels, queries and keys together", _triton_rotary),
        _reference("torch", REFERENCE_ROTARY),
    ),
    "cross_entropy": (
        Candidate("triton", "Triton kernels", _triton_cross_entropy),
        _reference("torch", REFERENCE_CROSS_ENTROPY),
    ),
    "router": (
        Candidate("mm", "torch products of bf16 with sums in fp32, fp32 copies for others", _router_mm),
        _reference("torch, fp32 copies", reference_router_logits),
    ),
    "permutation": (
        Candidate("triton", "Triton kernels, torch for fp64", _triton_permutation),
        _reference("torch", REFERENCE_PERMUTATION),
    ),
    "grouped_linear": (
        Candidate(
            "grouped_mm",
            "torch grouped_mm for bf16 and widths that are multiples of 8, one expert at a time for others",
            _grouped_mm,
        ),
        Candidate("triton", "Triton kernels for bf16, one expert at a time for others", _triton_grouped),
        Candidate(
            "grouped_gemm",
            "grouped_gemm for bf16 and widths that are multiples of 8, one expert at a time for others",
            _grouped_gemm,
        ),
        _reference("torch, one expert at a time", reference_grouped_linear),
    ),
    "expert_mlp": (
        Candidate("triton", "Triton kernels for bf16, torch for others", _triton_expert_mlp),
        _reference("three grouped products and the activation", ComposedExpertMlp),
    ),
}
