"""Which implementation serves each op on a device, and why. Decided once, at start, and told to the user."""

from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from megavl.ops.activation import swiglu
from megavl.ops.attention import PackedAttention, fused_attention, reference_attention
from megavl.ops.cross_entropy import REFERENCE_CROSS_ENTROPY, CrossEntropy
from megavl.ops.expert_mlp import ExpertMlp, composed_expert_mlp
from megavl.ops.grouped import GroupedLinear, grouped_gemm_linear, grouped_mm_linear, reference_grouped_linear
from megavl.ops.norm import rms_norm
from megavl.ops.permutation import REFERENCE_PERMUTATION, Permutation
from megavl.ops.products import products
from megavl.ops.rope import Rotate, rotate_halves, rotate_pairs
from megavl.ops.versions import causal_varlen

_AMPERE = (8, 0)  # compute capability; FlashAttention 2 needs it
# Major ones for which torch has a kernel of grouped products; on others its grouped_mm is a loop too.
_HOPPER, _BLACKWELL = 9, 10
_AMPERE_MAJOR = 8
_TORCH_ONLY = "torch (no other implementation)"


@dataclass(frozen=True)
class Ops:
    """The implementation of each op.

    products: the context that forward and backward passes run in
    lines: one per op, what serves it and why
    """

    attention: PackedAttention
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    swiglu: Callable[[Tensor, Tensor], Tensor]
    rotate_halves: Rotate
    rotate_pairs: Rotate
    cross_entropy: CrossEntropy
    permutation: Permutation
    grouped_linear: GroupedLinear
    expert_mlp: ExpertMlp
    products: AbstractContextManager
    lines: tuple[str, ...]


def choose(device: torch.device) -> Ops:
    """The fastest implementation of each op that this installation has for `device`."""
    attention, attention_line = _attention(device)
    norm, norm_line = _rms_norm(device)
    permutation, permutation_line = _permutation(device)
    grouped, grouped_line = _grouped_linear(device)
    expert_mlp, expert_mlp_line = _expert_mlp(device, grouped)
    product_context, products_line = products(device)
    return Ops(
        attention=attention,
        rms_norm=norm,
        swiglu=swiglu,
        rotate_halves=rotate_halves,
        rotate_pairs=rotate_pairs,
        cross_entropy=REFERENCE_CROSS_ENTROPY,
        permutation=permutation,
        grouped_linear=grouped,
        expert_mlp=expert_mlp,
        products=product_context,
        lines=(
            f"attention: {attention_line}",
            f"rms_norm: {norm_line}",
            f"swiglu: {_TORCH_ONLY}",
            f"rotary positions: {_TORCH_ONLY}",
            f"cross entropy: {_TORCH_ONLY}",
            f"permutation of experts' rows: {permutation_line}",
            f"SwiGLU of experts: {expert_mlp_line}",
            f"products of experts: {grouped_line}",
            f"matrix products: {products_line}",
        ),
    )


def _attention(device: torch.device) -> tuple[PackedAttention, str]:
    if device.type != "cuda":
        return reference_attention, f"torch, one document at a time (fused kernels need CUDA, the device is {device})"
    if torch.cuda.get_device_capability(device) < _AMPERE:
        name = torch.cuda.get_device_name(device)
        return reference_attention, f"torch, one document at a time (fused kernels need Ampere, {name} is older)"
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError as error:
        missing = f"flash-attn does not import: {error}"
    else:

        def flash_attn(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
            return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, longest, longest, causal=True)

        return fused_attention(flash_attn), "flash-attn for fp16 and bf16, torch one document at a time for fp32"
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        return reference_attention, f"torch, one document at a time ({missing}; {error})"
    line = f"torch varlen_attn for fp16 and bf16, one document at a time for fp32 ({missing})"
    return fused_attention(causal_varlen(varlen_attn)), line


def _rms_norm(device: torch.device) -> tuple[Callable[[Tensor, Tensor, float], Tensor], str]:
    if device.type != "cuda":
        return rms_norm, f"torch (apex needs CUDA, the device is {device})"
    try:
        # The compiled extension is imported for its own sake: apex itself imports without it, and fails when called.
        import fused_layer_norm_cuda  # noqa: F401
        from apex.normalization.fused_layer_norm import fused_rms_norm_affine
    except ImportError as error:
        return rms_norm, f"torch (apex does not import: {error})"

    def fused(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return fused_rms_norm_affine(x, weight, weight.shape, eps)

    return fused, "apex FusedRMSNorm"


def _permutation(device: torch.device) -> tuple[Permutation, str]:
    if device.type != "cuda":
        return REFERENCE_PERMUTATION, f"torch (Triton kernels need CUDA, the device is {device})"
    try:
        import triton  # noqa: F401

        from megavl.ops.kernels.permutation import TRITON_PERMUTATION
    except ImportError as error:
        return REFERENCE_PERMUTATION, f"torch (triton does not import: {error})"
    return TRITON_PERMUTATION, "Triton kernels, torch for fp64"


def _grouped_linear(device: torch.device) -> tuple[GroupedLinear, str]:
    if device.type != "cuda":
        return reference_grouped_linear, f"torch, one expert at a time (grouped_mm needs CUDA, the device is {device})"
    major, _ = torch.cuda.get_device_capability(device)
    if major == _AMPERE_MAJOR:
        with suppress(ImportError):
            import triton  # noqa: F401

            from megavl.ops.kernels.grouped import grouped_linear

            return grouped_linear, "Triton kernels for bf16, one expert at a time for others"
    if major not in (_HOPPER, _BLACKWELL):
        name = torch.cuda.get_device_name(device)
        try:
            from grouped_gemm.ops import gmm
        except ImportError as error:
            why = f"{name} is neither Hopper nor Blackwell, and grouped_gemm does not import: {error}"
            return reference_grouped_linear, f"torch, one expert at a time ({why})"
        words = "grouped_gemm for bf16 and widths that are multiples of 8, one expert at a time for others"
        return grouped_gemm_linear(gmm), words
    return (
        # On Blackwell it leaves the gradient of an expert without rows unwritten (github.com/pytorch/pytorch, 172439).
        grouped_mm_linear(clears_empty=major == _BLACKWELL),
        "torch grouped_mm for bf16 and widths that are multiples of 8, one expert at a time for others",
    )


def _expert_mlp(device: torch.device, grouped_linear: GroupedLinear) -> tuple[ExpertMlp, str]:
    composed = composed_expert_mlp(grouped_linear, swiglu)
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == _AMPERE_MAJOR:
        try:
            import triton  # noqa: F401

            from megavl.ops.kernels.grouped import expert_mlp
        except ImportError as error:
            return composed, f"three products of experts (triton does not import: {error})"
        return expert_mlp, "Triton kernels for bf16, torch for others"
    return composed, "three products of experts (fused Triton kernels are for Ampere)"
