"""Uses of the ops that a start-time trial runs: operands of given shapes, forward and backward."""

import math
from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from megavl.ops.attention import PackedAttention
from megavl.ops.cross_entropy import CrossEntropy
from megavl.ops.expert_mlp import ExpertMlp
from megavl.ops.grouped import GroupedLinear, Groups
from megavl.ops.norm import Norms
from megavl.ops.permutation import Permutation
from megavl.ops.rope import Rotary, rotary_tables
from megavl.ops.router import RouterLogits
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


def attention_case(
    lengths: Sequence[int], heads: int, kv_heads: int, width: int, value_width: int, dtype: torch.dtype
) -> Case:
    """Queries [T, heads, width], keys [T, kv_heads, width] and values [T, kv_heads, value_width] of documents."""
    tokens, borders = sum(lengths), list(accumulate(lengths, initial=0))

    def run(attention: PackedAttention, operands: list[Tensor]) -> list[Tensor]:
        *qkv, upstream = operands
        cu_seqlens = torch.tensor(borders, dtype=torch.int32, device=upstream.device)
        return _passes(lambda q, k, v: attention(q, k, v, cu_seqlens, lengths), qkv, [upstream])

    q, k, v = [tokens, heads, width], [tokens, kv_heads, width], [tokens, kv_heads, value_width]
    shapes = f"{_words(dtype, tokens, heads, width)}, {kv_heads} key heads, values of {value_width}"
    documents = f"documents of {', '.join(map(str, lengths))}"
    upstream = [tokens, heads, value_width]
    return Case(f"{shapes}, {documents}", lambda device: _normal(device, dtype, q, k, v, upstream), run)


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
    """Gate and up, [rows, width] each, halves of one tensor as a product with both weights returns them."""

    def run(swiglu: Callable[[Tensor, Tensor], Tensor], operands: list[Tensor]) -> list[Tensor]:
        gate_up, upstream = operands
        return _passes(swiglu, gate_up.chunk(2, dim=1), [upstream])

    shapes = [rows, 2 * width], [rows, width]
    return Case(_words(dtype, rows, width), lambda device: _normal(device, dtype, *shapes), run)


def rotary_case(tokens: int, heads: int, k_heads: int, width: int, dtype: torch.dtype) -> Case:
    """Queries [tokens, heads, width] and keys [tokens, k_heads, width]."""

    def make(device: torch.device) -> list[Tensor]:
        q, k = [tokens, heads, width], [tokens, k_heads, width]
        tables = rotary_tables(torch.arange(tokens, device=device), width, 10000.0)
        return [*_normal(device, dtype, q, k, q, k), *tables]

    def run(rotary: Rotary, operands: list[Tensor]) -> list[Tensor]:
        q, k, *upstream, cos, sin = operands
        return _passes(lambda q, k: rotary.halves(q, k, cos, sin), (q, k), upstream)

    return Case(f"{_words(dtype, tokens, heads, width)}, {k_heads} key heads", make, run)


def latent_rotary_case(tokens: int, heads: int, nope: int, rope: int, value: int, dtype: torch.dtype) -> Case:
    """Queries [tokens, heads, nope + rope], keys and values [tokens, heads, nope + value] of latent attention."""

    def make(device: torch.device) -> list[Tensor]:
        q, kv, v = ([tokens, heads, width] for width in (nope + rope, nope + value, value))
        tables = rotary_tables(torch.arange(tokens, device=device), rope, 10000.0)
        return [*_normal(device, dtype, q, kv, [tokens, 1, rope], q, q, v), *tables]

    def run(rotary: Rotary, operands: list[Tensor]) -> list[Tensor]:
        q, kv, k_rope, *upstream, cos, sin = operands
        return _passes(lambda *leaves: rotary.latent(*leaves, cos, sin), (q, kv, k_rope), upstream)

    return Case(f"{_words(dtype, tokens, heads)}, {nope} + {rope} channels, values of {value}", make, run)


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


def router_case(tokens: int, experts: int, width: int, dtype: torch.dtype) -> Case:
    """Tokens [tokens, width] with the weight [experts, width]."""

    def make(device: torch.device) -> list[Tensor]:
        h, weight, upstream = _normal(device, dtype, [tokens, width], [experts, width], [tokens, experts])
        return [h, weight, upstream + upstream.float() * 1e-3]

    def run(router_logits: RouterLogits, operands: list[Tensor]) -> list[Tensor]:
        h, weight, upstream = operands
        return _passes(router_logits, (h, weight), [upstream])

    return Case(_words(dtype, tokens, experts, width), make, run)


def permutation_case(tokens: int, per_token: int, experts: int, width: int, dtype: torch.dtype) -> Case:
    """Rows of [tokens, width] to `per_token` of `experts` experts and back."""

    def make(device: torch.device) -> list[Tensor]:
        generator = torch.Generator(device).manual_seed(1)
        scores = torch.rand(tokens, experts, generator=generator, device=device)
        x, moved_upstream, upstream = _normal(
            device, dtype, [tokens, width], [tokens * per_token, width], [tokens, width]
        )
        weights, chosen = scores.topk(per_token, dim=1)  # [tokens, per_token] each
        return [x, weights, moved_upstream, upstream, chosen]

    def run(permutation: Permutation, operands: list[Tensor]) -> list[Tensor]:
        x, weights, *upstream, chosen = operands
        order, inverse, counts = permutation.sort_by_expert(chosen.flatten(), experts)
        rows, places = order // per_token, inverse.view_as(chosen)

        def there_and_back(x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
            moved = permutation.permute(permutation.spread(x, rows, places), inverse, order)
            return moved, permutation.combine(permutation.permute(moved, order, inverse), weights, places)

        return [*_passes(there_and_back, (x, weights), upstream), order.float(), counts.float()]

    return Case(f"{_words(dtype, tokens, width)}, {per_token} of {experts} experts", make, run)


def _expert_rows(rows: int, experts: int, device: torch.device) -> Groups:
    """As many rows for each expert as for the others, but for the first, which has those of the second as well."""
    counts = torch.full((experts,), rows // experts, device=device)
    counts[-1] += rows % experts
    if experts > 1:
        counts[0], counts[1] = counts[0] + counts[1], 0
    return Groups(counts)


def grouped_linear_case(rows: int, experts: int, d_in: int, d_out: int, dtype: torch.dtype) -> Case:
    """Rows [rows, d_in] with the matrices [experts, d_out, d_in] of their experts. One expert has no row."""

    def run(grouped_linear: GroupedLinear, operands: list[Tensor]) -> list[Tensor]:
        x, weight, upstream = operands
        groups = _expert_rows(rows, experts, x.device)
        return _passes(lambda x, weight: grouped_linear(x, weight, groups), (x, weight), [upstream])

    shapes = ([rows, d_in], [experts, d_out, d_in], [rows, d_out])
    return Case(_words(dtype, rows, experts, d_in, d_out), lambda device: _normal(device, dtype, *shapes), run)


def expert_mlp_case(rows: int, experts: int, width: int, hidden: int, dtype: torch.dtype) -> Case:
    """Rows [rows, width] through the SwiGLU layers of their experts, of `hidden` channels each."""

    def run(layer: ExpertMlp, operands: list[Tensor]) -> list[Tensor]:
        *leaves, upstream = operands
        groups = _expert_rows(rows, experts, upstream.device)
        return _passes(lambda x, gate, up, down: layer(x, gate, up, down, groups), leaves, [upstream])

    def make(device: torch.device) -> list[Tensor]:
        matrices = [experts, hidden, width], [experts, hidden, width], [experts, width, hidden]
        x, *weights, upstream = _normal(device, dtype, [rows, width], *matrices, [rows, width])
        return [x, *(weight / weight.shape[2] ** 0.5 for weight in weights), upstream]

    return Case(_words(dtype, rows, experts, width, hidden), make, run)
