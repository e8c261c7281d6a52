"""transformers on the same slice, as the baseline.

DeepseekVLHybridForConditionalGeneration with the same shapes and frozen parameters, bf16, scaled_dot_product_attention,
torch's fused AdamW on the bf16 parameters (no fp32 masters), gradients clipped to norm 1. Both sides have packs of one
document.
"""

import statistics
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from benchmarks import transformers_model
from gpu.bars import Bar, judge, on_hopper
from gpu.files import results_path
from gpu.results import Finding, Results, Setting, Skipped, read_results
from gpu.run import full_width, mesh_of_one, packs, start, tiny
from gpu.slices import KINDS, one_document
from torch import nn

from megavl.batch import Kind, StepBatch
from megavl.config.run import RunConfig
from megavl.plan.cost import step_flops
from megavl.plan.hardware import peak_flops

# Ratio of our tokens/s to theirs, with the blocks that it is set for.
_LEAST_RATIO: Mapping[Kind, float] = {"text": 1.25, "multimodal": 1.4}
_BLOCKS = 6
_WARMUP, _STEPS = 2, 3


def run(setting: Setting, results: Results, subject: str) -> None:
    """Measure transformers' steps, and the ratio of the slice's to them."""
    ours = ours_of(setting.work, subject)
    blocks = ours.get("build", {}).get("blocks", _BLOCKS)
    env = start()
    config = tiny(subject) if setting.rehearse else full_width(subject, f"model.decoder.layers={blocks}")
    model = results.prepare("build", lambda: build(config, env.device))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.optim.lr, betas=config.optim.betas, fused=True)
    mesh = mesh_of_one(config, env)
    for kind in KINDS:
        batch = packs(config, env, mesh, kind, documents=1)
        theirs = results.measure(kind, lambda b=batch: timed(model, optimizer, config, b, env.device, setting))
        judged = blocks == _BLOCKS and on_hopper(env.device)
        results.measure(f"{kind}: ratio", lambda k=kind, t=theirs, j=judged: ratio(ours, t, k, j))


def ours_of(work: Path, subject: str) -> dict[str, dict]:
    """Values of the slice's measurements by name."""
    found = read_results(results_path(work, f"slices.{subject}"))
    return {each["name"]: each["values"] for each in found["measurements"]}


def ratio(ours: dict[str, dict], theirs: dict, kind: Kind, judged: bool) -> Finding:
    """Our tokens/s over theirs, and the verdict."""
    mine = ours.get(one_document(kind), {}).get("tokens_per_s")
    if mine is None or "tokens_per_s" not in theirs:
        raise Skipped("one of the two was not measured")
    value = mine / theirs["tokens_per_s"]
    line = f"{mine:,.0f} tokens/s against {theirs['tokens_per_s']:,.0f}: {value:.2f} of transformers"
    values = {"ratio": value}
    if not judged:
        return Finding(f"{line}; no bar", values)
    verdict, failures = judge([Bar("ratio", _LEAST_RATIO[kind], "{:.2f}")], values)
    return Finding(f"{line}{verdict}", values, failures=failures)


def build(config: RunConfig, device: torch.device) -> tuple[nn.Module, Finding]:
    """transformers' model of the same shapes, initialised on the device, with the recipe's frozen parameters."""
    try:
        import transformers

        torch.manual_seed(0)
        model = transformers_model.build(config.model, torch.bfloat16, device)
    except ImportError as error:
        raise Skipped(f"transformers has no DeepseekVLHybrid here: {error}") from error
    transformers_model.optimizer_groups(model, config.model, config.optim)
    count = sum(parameter.numel() for parameter in model.parameters())
    dtypes = {str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()}
    return model, Finding(
        f"transformers {transformers.__version__}, DeepseekVLHybrid, {config.model.decoder.layers} blocks, "
        f"{count / 1e9:.3g} B parameters in {', '.join(sorted(dtypes))}, {model.config._attn_implementation} attention",
        {"parameters": count, "version": transformers.__version__},
    )


def timed(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: RunConfig,
    batch: StepBatch,
    device: torch.device,
    setting: Setting,
) -> Finding:
    """Time whole steps of as many micro-batches as the slice has: tokens/s, MFU, memory."""
    warmup, steps = (1, 1) if setting.rehearse else (_WARMUP, _STEPS)
    on_cuda = device.type == "cuda"
    inputs = transformers_model.inputs_of(batch.micro_batches[0].to(device), config.model, torch.bfloat16)
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    times, loss = [], None
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(warmup + steps):
        if on_cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in batch.micro_batches:
            loss = model(**inputs, use_cache=False).loss / len(batch.micro_batches)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if on_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    step_s = statistics.median(times[warmup:])
    flops = step_flops(config, **batch.counts).model
    peak = peak_flops(torch.cuda.get_device_name(device)) if on_cuda else None
    memory = torch.cuda.max_memory_allocated() if on_cuda else None
    values = {
        "tokens_per_s": batch.tokens / step_s,
        "step_s": step_s,
        "steps_s": times[warmup:],
        "mfu": flops / step_s / peak if peak else None,
        "memory_bytes": memory,
        "loss": loss.item() * len(batch.micro_batches),
    }
    of_peak = f", MFU {values['mfu']:.1%}" if peak else ""
    used = f", {memory / 2**30:.1f} GiB" if memory else ""
    return Finding(f"{batch.tokens / step_s:,.0f} tokens/s{of_peak}, step {step_s * 1e3:,.0f} ms{used}", values)
