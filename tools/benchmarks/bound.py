"""Least launches and bytes of an operator: every input read once and every output written once, by one kernel.

In the backward pass the gradients of the outputs and the inputs are read, and the gradients of the inputs are written.
A product has one kernel for each gradient.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.attribution import Call
from torch import Tensor

from megavl.rehearsal.launches import distinct_bytes

# Operators whose gradient does not depend on the differentiated inputs, and those whose gradient needs the outputs.
_LINEAR = frozenset({"rotate_halves", "rotate_latent", "permutation.spread", "permutation.permute"})
_OUTPUTS_READ = frozenset({"attention"})


@dataclass(frozen=True)
class Work:
    """Launches of kernels, and bytes that they read and write."""

    launches: int = 0
    bytes: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.launches + other.launches, self.bytes + other.bytes)


def forward_bound(call: Call) -> Work:
    """Of the forward pass of one call. Outputs that are views of an input are not written, nor read in the input."""
    storages = {tensor.untyped_storage()._cdata for tensor in call.inputs}
    views = _bytes(output for output in call.outputs if output.untyped_storage()._cdata in storages)
    return Work(1, _bytes(call.inputs) + _bytes(call.outputs) - 2 * views)


def backward_bound(call: Call) -> Work:
    """Of the backward pass of one call; nothing if no input has a gradient."""
    call = _of_sum(call)
    differentiated = [tensor for tensor in call.inputs if tensor.requires_grad]
    others = [tensor for tensor in call.inputs if not tensor.requires_grad]
    if not differentiated:
        return Work()
    read = _bytes(output for output in call.outputs if output.requires_grad) + _bytes(others)
    if call.operator not in _LINEAR:
        read += _bytes(differentiated)
    if call.operator in _OUTPUTS_READ:
        read += _bytes(call.outputs)
    return Work(len(differentiated) if _is_product(call) else 1, read + _bytes(differentiated))


def residual_bound(hidden: Tensor, additions: int) -> Work:
    """Of `additions` sums of two tensors like `hidden`."""
    return Work(additions, additions * 3 * distinct_bytes(hidden))


def _of_sum(call: Call) -> Call:
    """The norm of a sum as one of the sum, its first output: both addends have the same gradient, written once."""
    if call.operator != "add_rms_norm":
        return call
    _, _, weight = call.inputs
    return Call(call.operator, (call.outputs[0], weight), call.outputs)


def _is_product(call: Call) -> bool:
    return call.operator.endswith(("proj", "grouped_linear", "product"))


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(distinct_bytes(tensor) for tensor in {id(tensor): tensor for tensor in tensors}.values())
