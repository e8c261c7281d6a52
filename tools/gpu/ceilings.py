"""What this machine reaches alone in the shapes of the models: products, a copy, attention over packs, the loss."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from gpu.bars import Bar, judge, on_hopper
from gpu.results import Finding, Results, Setting, Table
from gpu.run import MODELS, full_width, tiny
from gpu.timing import seconds_of
from torch import Tensor

from megavl.config.run import RunConfig
from megavl.ops.cases import cross_entropy_case
from megavl.ops.dispatch import choose
from megavl.ops.versions import causal_varlen

_COPIED_BYTES = {"cuda": 2 << 30, "cpu": 1 << 20}
_DOCUMENTS = (1, 4)
# FLOPs of forward and backward over those of forward: backward has five products, forward two.
_WITH_BACKWARD = 3.5
# Most time of the cross entropy of VL-7B's pack on Hopper. Reading and writing its logits takes 0.4 ms on an H200.
_MOST_SECONDS = 1.5e-3


def run(setting: Setting, results: Results, subject: str) -> None:
    """Measure each kind of work alone."""
    device = torch.device(setting.device)
    configs = [tiny(model) if setting.rehearse else full_width(model) for model in MODELS]
    results.measure("matrix products", lambda: matrix_products(configs, device))
    results.measure("copy", lambda: copy(device))
    results.measure("attention", lambda: attention(configs, device))
    results.measure("cross entropy", lambda: cross_entropy(configs[0], device))


def shapes(config: RunConfig) -> Iterator[tuple[str, int, int]]:
    """(name, channels in, channels out) of the products of a token in a decoder."""
    decoder = config.model.decoder
    yield "attention output", decoder.width, decoder.width
    yield "gate and up", decoder.width, decoder.mlp_width
    yield "down", decoder.mlp_width, decoder.width
    yield "head", decoder.width, decoder.vocab_size
    if decoder.moe is not None:
        yield "shared experts", decoder.width, decoder.moe.shared_width
    if decoder.mla is not None:
        key_values = decoder.heads * (decoder.mla.nope_width + decoder.mla.value_width)
        yield "keys and values", decoder.mla.kv_rank, key_values


def matrix_products(configs: list[RunConfig], device: torch.device) -> Finding:
    """TFLOP/s of bf16 products of a pack of tokens."""
    rates, rows = {}, []
    for config in configs:
        tokens = config.data.seq_len
        for name, d_in, d_out in shapes(config):
            x = torch.randn(tokens, d_in, device=device, dtype=torch.bfloat16)
            weight = torch.randn(d_out, d_in, device=device, dtype=torch.bfloat16)
            key = f"{tokens} x {d_in} x {d_out}"
            if key not in rates:
                rates[key] = 2 * tokens * d_in * d_out / seconds_of(lambda: x @ weight.t(), device)  # noqa: B023
            rows.append((config.model.name, name, key, f"{rates[key] / 1e12:.3g}"))
    line = f"{min(rates.values()) / 1e12:.3g} to {max(rates.values()) / 1e12:.3g} TFLOP/s over {len(rates)} shapes"
    return Finding(line, rates, [Table("matrix products", ("model", "product", "shape", "TFLOP/s"), rows)])


def copy(device: torch.device) -> Finding:
    """Bytes read and written in a second by a copy on the device."""
    source = torch.randn(_COPIED_BYTES[device.type] // 2, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    rate = 2 * source.numel() * source.element_size() / seconds_of(lambda: target.copy_(source), device)
    return Finding(f"{rate / 1e12:.3g} TB/s read and written", {"bytes_per_s": rate})


def attention(configs: list[RunConfig], device: torch.device) -> Finding:
    """TFLOP/s of causal attention over packs, forward and backward."""
    rates, rows = {}, []
    for config in configs:
        decoder, tokens = config.model.decoder, config.data.seq_len
        width = decoder.head_width if decoder.mla is None else decoder.mla.key_width
        draw = [torch.randn(tokens, decoder.heads, width, device=device, dtype=torch.bfloat16) for _ in range(4)]
        q, k, v = (each.requires_grad_() for each in draw[:3])
        for documents in _DOCUMENTS:
            length = tokens // documents
            attend = packed_attention(documents, length, device)

            def work(attend=attend, q=q, k=k, v=v, upstream=draw[3]) -> None:
                torch.autograd.grad(attend(q, k, v), (q, k, v), upstream)

            pairs = documents * length * (length + 1) / 2
            flops = _WITH_BACKWARD * 4 * pairs * decoder.heads * width
            name = f"{decoder.heads} heads of {width}, {documents} x {length} tokens"
            if name not in rates:
                rates[name] = flops / seconds_of(work, device)
            rows.append((config.model.name, name, f"{rates[name] / 1e12:.3g}"))
    line = f"{min(rates.values()) / 1e12:.3g} to {max(rates.values()) / 1e12:.3g} TFLOP/s, forward and backward"
    return Finding(line, rates, [Table("attention over packs", ("model", "shape", "TFLOP/s"), rows)])


def cross_entropy(config: RunConfig, device: torch.device) -> Finding:
    """Time of the loss of a pack and of its gradient, from logits that are there."""
    case = cross_entropy_case(config.data.seq_len, config.model.decoder.vocab_size, torch.bfloat16)
    operands, implementation = case.make(device), choose(device).cross_entropy
    seconds = seconds_of(lambda: case.run(implementation, operands), device)
    values = {"per_second": 1 / seconds, "seconds": seconds}
    bars = [Bar("per_second", 1 / _MOST_SECONDS, "{:,.0f} a second")] if on_hopper(device) else []
    verdict, failures = judge(bars, values)
    return Finding(f"{case.shapes}: {seconds * 1e3:.2f} ms{verdict}", values, failures=failures)


def packed_attention(documents: int, length: int, device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """torch's varlen_attn, causal, over documents of equal length; on a CPU one document after another."""
    if device.type != "cuda":

        def one_by_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            # [documents, H, length, d] each
            heads_first = (x.unflatten(0, (documents, length)).transpose(1, 2) for x in (q, k, v))
            return (
                F.scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2).flatten(0, 1)
            )  # [T, H, d]

        return one_by_one
    from torch.nn.attention.varlen import varlen_attn

    kernel = causal_varlen(varlen_attn)
    cu_seqlens = torch.arange(0, documents * length + 1, length, device=device, dtype=torch.int32)
    return lambda q, k, v: kernel(q, k, v, cu_seqlens, length)
