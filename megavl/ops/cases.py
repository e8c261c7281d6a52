"""Uses of the ops that a start-time trial runs: operands of given shapes, forward and backward."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megavl.ops.cross_entropy import CrossEntropy
from megavl.ops.norm import Norms
from megavl.ops.rope import Rotary, rotary_tables
from megavl.ops.trial import Case


def _words(dtype: torch.dtype, *sizes: int) -> str:
    return f"{' x '.join(map(str, sizes))} {str(dtype).removeprefix('torch.')}"


def _normal(device: torch.device, dtype: torch.dtype, *shapes: Sequence[int]) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    return [torch.randn(*shape, generator=generator, device=device).to(dtype) for shape in shapes]


def _passes(function: Callable, operands: Sequence[Tensor], upstream: Sequence[Tensor]) -> list[Tensor]:
    """Outputs of a function, and the gradients of its operands."""
    leaves = [x.detach().requires_grad_() for x in operands]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, leaves, upstream)]


def norm_case(tokens: int, width: int, eps: float, dtype: torch.dtype) -> Case:
    """Norm of [tokens, width], and norm with the residual addition before it."""

    def run(norms: Norms, operands: list[Tensor]) -> list[Tensor]:
        x, delta, weight, upstream, total_upstream = operands
        alone = _passes(lambda x, weight: norms.rms_norm(x, weight, eps), (x, weight), [upstream])
        return alone + _passes(
            lambda x, delta, weight: norms.add_rms_norm(x, delta, weight, eps),
            (x, delta, weight),
            [total_upstream, upstream],
        )

    rows = [tokens, width]
    shapes = (rows, rows, [width], rows, rows)
    return Case(_words(dtype, tokens, width), lambda device: _normal(device, dtype, *shapes), run)


def swiglu_case(rows: int, width: int, dtype: torch.dtype) -> Case:
    """Gate and up, [rows, width] each."""

    def run(swiglu: Callable[[Tensor, Tensor], Tensor], operands: list[Tensor]) -> list[Tensor]:
        gate, up, upstream = operands
        return _passes(swiglu, (gate, up), [upstream])

    return Case(_words(dtype, rows, width), lambda device: _normal(device, dtype, *[[rows, width]] * 3), run)


def rotary_case(tokens: int, heads: int, k_heads: int, width: int, pairs: bool, dtype: torch.dtype) -> Case:
    """Queries [tokens, heads, width] and keys [tokens, k_heads, width], channels in halves or pairs."""

    def make(device: torch.device) -> list[Tensor]:
        q, k = [tokens, heads, width], [tokens, k_heads, width]
        tables = rotary_tables(torch.arange(tokens, device=device), width, 10000.0)
        return [*_normal(device, dtype, q, k, q, k), *tables]

    def run(rotary: Rotary, operands: list[Tensor]) -> list[Tensor]:
        q, k, *upstream, cos, sin = operands
        rotate = rotary.pairs if pairs else rotary.halves
        return _passes(lambda q, k: rotate(q, k, cos, sin), (q, k), upstream)

    order = "pairs" if pairs else "halves"
    return Case(f"{_words(dtype, tokens, heads, width)}, {k_heads} key heads, {order}", make, run)


def cross_entropy_case(tokens: int, vocab: int, dtype: torch.dtype) -> Case:
    """Logits [tokens, vocab] of one rank, every fourth label being of another."""

    def make(device: torch.device) -> list[Tensor]:
        generator = torch.Generator(device).manual_seed(1)
        columns = torch.randint(0, vocab, (tokens,), generator=generator, device=device)
        columns[::4] = -1
        return [*_normal(device, dtype, [tokens, vocab]), columns]

    def run(cross_entropy: CrossEntropy, operands: list[Tensor]) -> list[Tensor]:
        logits, columns = operands
        statistics = cross_entropy.statistics(logits, columns)
        log_normaliser = statistics.maximum + statistics.total.log()
        log_normaliser[::8] = math.inf
        cross_entropy.write_gradient(logits, columns, log_normaliser)
        return [*statistics, logits]

    return Case(_words(dtype, tokens, vocab), make, run)
