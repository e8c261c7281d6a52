"""Identity that gives parameters gradients of zeros without reading them."""

import torch
from torch import Tensor
from torch.autograd import Function


class _ZeroGradients(Function):
    @staticmethod
    def forward(ctx, x: Tensor, *unread: Tensor) -> Tensor:
        # Not the tensors: ZeRO-3 frees parameters after the forward pass.
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
    """Identity on `x`; backward gives each tensor of `unread` that requires a gradient one of zeros.

    The result requires a gradient if `x` or any of `unread` does.
    """
    return _ZeroGradients.apply(x, *unread)
