"""Products at the beginning of a tensor-parallel region, whose collectives overlap with matrix products.

Backward of y = x W^T, whose input x is cut along the tokens under sequence parallelism:

| step | computed              | under way meanwhile                                                         |
|------|-----------------------|-----------------------------------------------------------------------------|
| 1    | dx = dy W             | all-gather of x, if selective recomputation repeats it                      |
| 2    | dW = dy^T x           | reduce-scatter of dx under sequence parallelism, all-reduce of dx otherwise |

Autograd's own nodes cannot do this: the node of the product computes dx and dW, and the node of the collective runs
after it.

Source: `LinearWithGradAccumulationAndAsyncCommunication` of Megatron-LM.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from megavl.parallel.collectives import all_gather, enter_parallel, start_all_gather, start_entry_gradient
from megavl.parallel.groups import TensorAxis


class _Entry(Function):
    @staticmethod
    def forward(
        ctx, tp: TensorAxis, x: Tensor, companion: Tensor | None, *weights: Tensor
    ) -> tuple[Tensor | None, ...]:
        whole, entered = x, None if companion is None else companion.view_as(companion)
        if tp.sequence:
            whole = all_gather(x if companion is None else torch.cat((x, companion), dim=1), tp)  # [T, d_in (+ d)]
            whole, entered = whole[:, : x.shape[1]], None if companion is None else whole[:, x.shape[1] :]
        ctx.tp, ctx.width = tp, x.shape[1]
        ctx.gathers = tp.sequence and tp.gathers_again
        _, of_x, _, *of_weights = ctx.needs_input_grad
        kept = None if not any(of_weights) else x if ctx.gathers else whole
        ctx.save_for_backward(kept, *(weight if of_x else None for weight in weights))
        return *(F.linear(whole, weight) for weight in weights), entered

    @staticmethod
    def backward(ctx, *grads: Tensor | None):
        *grads, of_companion = grads
        kept, *weights = ctx.saved_tensors
        _, of_x, companion_needed, *of_weights = ctx.needs_input_grad
        gathering = start_all_gather(kept, ctx.tp) if ctx.gathers and any(of_weights) else None
        parts = [_summed_products(grads, weights)] if of_x else []  # [T, d_in]
        parts += [of_companion] if companion_needed else []  # [T, d]
        summing = None
        if parts:
            # The all-reduce overwrites its input, so an incoming gradient is copied even if it is the only part.
            summing = start_entry_gradient(torch.cat(parts, dim=1) if companion_needed else parts[0], ctx.tp)
        x = kept if gathering is None else gathering.wait()  # [T, d_in]
        weight_gradients = [
            torch.matmul(grad.t(), x) if needed else None  # [d_out / tp, d_in]
            for grad, needed in zip(grads, of_weights, strict=True)
        ]
        summed = None if summing is None else summing.wait()  # [T, ...] or [T / tp, ...]
        of_input = summed[:, : ctx.width] if of_x else None
        of_companion = (summed[:, ctx.width :] if of_x else summed) if companion_needed else None
        return None, of_input, of_companion, *weight_gradients


def _summed_products(grads: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Sum of dy W over the weights, a new tensor [T, d_in]."""
    total = torch.matmul(grads[0], weights[0])
    for grad, weight in zip(grads[1:], weights[1:], strict=True):
        total.add_(torch.matmul(grad, weight))
    return total


def entry_products(
    x: Tensor, weights: Sequence[Tensor], tp: TensorAxis, companion: Tensor | None = None
) -> tuple[list[Tensor], Tensor | None]:
    """Enter a parallel region by products of `x` with column-parallel weights.

    Args:
        x: [T, d_in], or [T / tp, d_in] under sequence parallelism
        weights: [d_out / tp, d_in] each
        companion: [T, d], or [T / tp, d] under sequence parallelism, in the dtype of `x`: enters by the same
            collective, and every rank gets all of it

    Returns:
        [T, d_out / tp] of each weight, and the companion, [T, d]
    """
    if tp.size > 1 and not torch.compiler.is_compiling():
        *outputs, companion = _Entry.apply(tp, x, companion, *weights)
        return outputs, companion
    if companion is not None and tp.size > 1:
        both = enter_parallel(torch.cat((x, companion), dim=1), tp)  # [T, d_in + d]
        x, companion = both.split((x.shape[1], companion.shape[1]), dim=1)  # [T, d_in], [T, d]
    else:
        x = enter_parallel(x, tp)  # [T, d_in]
    return [F.linear(x, weight) for weight in weights], companion
