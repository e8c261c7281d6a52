"""Parameters that take part in a graph without being read."""

import torch
from torch import Tensor
from torch.autograd import Function


class _ZeroGradients(Function):
    @staticmethod
    def forward(ctx, x: Tensor, *unread: Tensor) -> Tensor:
        # Not the tensors themselves: ZeRO-3 frees a parameter after the forward pass.
        ctx.unread = [(tensor.shape, tensor.dtype, tensor.device) for tensor in unread]
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        zeros = (
            torch.zeros(shape, dtype=dtype, device=device) if needed else None
            for (shape, dtype, device), needed in zip(ctx.unread, ctx.needs_input_grad[1:], strict=True)
        )
        return grad, *zeros


def with_zero_gradients(x: Tensor, *unread: Tensor) -> Tensor:
    """`x` itself. It requires a gradient if any of `unread` does, and in its backward pass each of them gets a gradient
    of zeros; nothing of them is read or computed."""
    return _ZeroGradients.apply(x, *unread)
