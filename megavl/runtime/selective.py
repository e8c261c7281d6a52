"""Selective recomputation: the backward pass recomputes what costs little, and no matrix product.

A product keeps its input for the gradient of its weight. The outputs of norms and of SwiGLU, the rows of routed experts
and the tokens that sequence parallelism gathers can be recomputed from tensors that autograd keeps anyway, so autograd
keeps the function and its inputs in place of such an output. Megatron-LM does the same by other means
(`CheckpointWithoutOutput`, and its linear layers under sequence parallelism).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from megavl.model.block import Block
from megavl.model.layout import PackLayout
from megavl.ops.attention import PackedAttention
from megavl.ops.dispatch import Ops
from megavl.ops.expert_mlp import ComposedExpertMlp
from megavl.parallel.groups import TensorAxis


class Derived:
    """A tensor that autograd does not keep, represented by the function and the inputs that compute it.

    Args:
        function: deterministic; it must return a tensor of the same strides each time
        inputs: its arguments, with a `Derived` in place of a tensor that is recomputed itself
    """

    def __init__(self, function: Callable[..., Tensor], inputs: list[Any]):
        self._function, self._inputs = function, inputs
        self._tensor: Tensor | None = None

    def tensor(self) -> Tensor:
        """The first call computes it. It lives until autograd has released every node that keeps this object, so
        several products share one computation."""
        if self._tensor is None:
            with torch.no_grad():
                self._tensor = self._function(
                    *(each.tensor() if isinstance(each, Derived) else each for each in self._inputs)
                )
            self._inputs = []
        return self._tensor


class Selective:
    """How decoder blocks are called, and the operators and the tensor axis that they get."""

    def __init__(self):
        # Outputs in the running block by their storage. Holding an output keeps its storage, and so its id, from reuse.
        self._outputs: dict[int, tuple[Tensor, Derived]] | None = None

    def run_block(self, block: Block, h: Tensor, layout: PackLayout) -> Tensor:
        """The `run_block` of a `VLM`. It changes no value."""
        self._outputs = {}
        try:
            with saved_tensors_hooks(self._pack, _unpack):
                return block(h, layout)
        finally:
            self._outputs = None

    def ops(self, ops: Ops) -> Ops:
        """`ops` whose outputs can be recomputed."""
        expert_mlp = ops.expert_mlp
        if isinstance(expert_mlp, ComposedExpertMlp):
            expert_mlp = ComposedExpertMlp(expert_mlp.grouped_linear, partial(self.call, expert_mlp.swiglu))
        return replace(
            ops,
            attention=partial(_attend_to_copies, ops.attention),
            rms_norm=partial(self.call, ops.rms_norm),
            add_rms_norm=partial(self._add_rms_norm, ops),
            swiglu=partial(self.call, ops.swiglu),
            permutation=replace(ops.permutation, spread=partial(self.call, ops.permutation.spread)),
            expert_mlp=expert_mlp,
        )

    def tensor_axis(self, tp: TensorAxis) -> TensorAxis:
        """`tp` whose all-gathers of tokens can be repeated."""
        return replace(tp, call=self.call, gathers_again=True)

    def call(self, function: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """function(*inputs). Products in a block recompute it instead of keeping it."""
        output = function(*inputs)
        self._record(output, function, inputs)
        return output

    def _add_rms_norm(self, ops: Ops, h: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """The sum is kept: it is the residual stream. The normalised values are computed from it."""
        h, normed = ops.add_rms_norm(h, delta, weight, eps)
        self._record(normed, ops.rms_norm, (h, weight, eps))
        return h, normed

    def _record(self, output: Tensor, function: Callable[..., Tensor], inputs: tuple[Any, ...]) -> None:
        if self._outputs is not None and output.requires_grad:
            derived = Derived(function, [self._kept(each) if isinstance(each, Tensor) else each for each in inputs])
            self._outputs[_storage(output)] = output, derived

    def _kept(self, x: Tensor) -> Tensor | Derived:
        """What a `Derived` keeps of an input: not the tensor itself if that can be recomputed."""
        recorded = self._outputs.get(_storage(x))
        return x.detach() if recorded is None else _view(x, *recorded)

    def _pack(self, x: Tensor) -> Tensor | Derived:
        recorded = self._outputs.get(_storage(x))
        if recorded is not None:
            return _view(x, *recorded)
        # A parameter must be kept as itself: ZeRO-3 exchanges its data. A node that keeps its own output as itself is a
        # reference cycle, which is freed by a backward pass only.
        return x if x.is_leaf else x.detach()


def _attend_to_copies(
    attention: PackedAttention, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, lengths: Sequence[int]
) -> Tensor:
    """Attention that keeps a copy of values that are columns of a joint product. The columns themselves would keep all
    of the product, with the queries and keys before their rotation. Values narrower than keys are columns of a product
    without queries, and need no copy."""
    return attention(q, k, v.contiguous() if v.shape[2] == k.shape[2] else v, cu_seqlens, lengths)


def _view(x: Tensor, output: Tensor, derived: Derived) -> Derived:
    """`x`, a view of `output` or `output` itself."""
    shape, strides, first = x.shape, x.stride(), x.storage_offset() - output.storage_offset()
    if (shape, strides, first) == (output.shape, output.stride(), 0):
        return derived
    return Derived(lambda whole: whole.as_strided(shape, strides, whole.storage_offset() + first), [derived])


def _unpack(kept: Tensor | Derived) -> Tensor:
    return kept.tensor() if isinstance(kept, Derived) else kept


def _storage(x: Tensor) -> int:
    """Identifies the storage for as long as a tensor refers to it; tensors without data have one too."""
    return x.untyped_storage()._cdata
