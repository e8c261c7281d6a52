"""Functions of one tensor with a given backward: what a collective and its dual share."""

from collections.abc import Callable

from torch import Tensor
from torch.autograd import Function

OneTensor = Callable[[Tensor], Tensor]


class _WithBackward(Function):
    @staticmethod
    def forward(ctx, x: Tensor, forward: OneTensor, backward: OneTensor) -> Tensor:
        ctx.gradient = backward
        return forward(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return ctx.gradient(grad), None, None


def with_backward(x: Tensor, forward: OneTensor, backward: OneTensor) -> Tensor:
    """forward(x), whose gradient is backward(gradient of the result).

    Args:
        x: any shape and dtype
        forward: must not return `x` itself, but may return a view of it
        backward: returns a tensor of the shape of `x`
    """
    return _WithBackward.apply(x, forward, backward)
