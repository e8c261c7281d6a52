"""A slice of a model at full width: as many blocks as fit, bf16, ZeRO-1, 8 micro-batches of 4096 tokens."""

import statistics
import time
from collections.abc import Sequence
from functools import cache

import torch
from gpu.bars import Bar, judge, on_hopper
from gpu.capacity import capacity
from gpu.kernels import Profile, Traffic, profile_of
from gpu.products import LEAST_FLOPS, ceilings, failures, gather
from gpu.results import Finding, Results, Setting, Skipped, Table
from gpu.run import Run, build, full_width, one_micro_batch, start, tiny
from gpu.timing import median_wall_s
from gpu.towers import tower_work
from gpu.waits import waits_of

from megavl import __version__
from megavl.batch import Kind, StepBatch
from megavl.plan.cost import step_flops
from megavl.plan.hardware import peak_flops
from megavl.runtime.env import Env

KINDS: tuple[Kind, ...] = ("text", "multimodal")
# Most blocks. The bars of VL-7B are set for its number; the others launch every kernel with theirs.
_MOST_BLOCKS = {"vl_7b": 6, "vl2_small": 4, "vl_1b": 24, "vl2_tiny": 12}
_MFU, _SPEED = "{:.1%} MFU", "{:,.0f} tokens/s"
# Of text steps with several documents in each pack.
_BARS = {"vl_7b": (Bar("mfu", 0.55, _MFU),), "vl2_small": (Bar("tokens_per_s", 75_000, _SPEED),)}
# Lowest MFU of a multimodal step of VL-7B over the MFU of its text step; slices that the host must not slow down.
_LEAST_SHARE, _DEVICE_BOUND = 0.8, ("vl2_small",)
_WARMUP, _STEPS = 2, 3
# Products in the report's table; the JSON has the failures of all products.
_ROWS = 40


def run(setting: Setting, results: Results, subject: str) -> None:
    """Measure the steps of a slice, then what one micro-batch of each kind launches."""
    env = start()
    run = results.prepare("build", lambda: build_slice(subject, env, setting))
    judged = on_hopper(env.device) and run.config.model.decoder.layers == _MOST_BLOCKS[subject]
    bars = _BARS.get(subject, ()) if judged else ()
    text = results.measure("text", lambda: timed(run, run.packs("text"), setting, bars))
    bars = (Bar("mfu", _LEAST_SHARE * text["mfu"], _MFU),) if judged and subject == "vl_7b" and "mfu" in text else ()
    results.measure("multimodal", lambda: timed(run, run.packs("multimodal"), setting, bars))
    if subject == "vl_7b":
        # transformers attends over one document in each pack; the stage `peers` compares with these.
        for kind in KINDS:
            results.measure(one_document(kind), lambda kind=kind: timed(run, run.packs(kind, 1), setting))
    results.measure("text: towers", lambda: towers(run))
    for kind in KINDS:
        batch = run.packs(kind)
        profile = cache(lambda batch=batch: profile_of(lambda: forward_backward(run, batch), not setting.rehearse))
        ahead = judged and kind == "text" and subject in _DEVICE_BOUND
        results.measure(f"{kind}: kernels", lambda b=batch, p=profile, a=ahead: kernels(run, b, p(), setting, a))
        results.measure(f"{kind}: products", lambda b=batch, p=profile: products(run, b, p(), setting))
        results.measure(f"{kind}: waits", lambda b=batch: waits(run, b, setting))


def one_document(kind: Kind) -> str:
    """Name of the measurement with one document in each pack."""
    return f"{kind}, one document"


def build_slice(subject: str, env: Env, setting: Setting) -> tuple[Run, Finding]:
    """The run with as many blocks as fit."""
    if setting.rehearse:
        config = tiny(subject)
        blocks, free = config.model.decoder.layers, None
    else:
        free, _ = torch.cuda.mem_get_info()
        most = _MOST_BLOCKS[subject]
        blocks = min(most, capacity(full_width(subject)).blocks(free))
        least = 1 if full_width(subject).model.decoder.moe is None else 2
        if blocks < least:
            raise Skipped(f"not even {least} blocks fit {free / 2**30:.0f} GiB")
        config = full_width(subject, f"model.decoder.layers={blocks}")
    started = time.perf_counter()
    run = build(config, env)
    run.synchronize()
    parameters = sum(parameter.numel() for parameter in run.replica.stages.parameters())
    spare = "" if free is None else f", {free / 2**30:.0f} GiB were free"
    return run, Finding(
        f"{config.model.name}, {blocks} blocks, {parameters / 1e9:.3g} B parameters, built in "
        f"{time.perf_counter() - started:.0f} s{spare}; megavl {__version__}",
        {"blocks": blocks, "parameters": parameters, "free_bytes": free},
    )


def forward_backward(run: Run, batch: StepBatch) -> None:
    """One micro-batch, to the end of its work on the device."""
    run.passes(one_micro_batch(batch))
    run.synchronize()


def timed(run: Run, batch: StepBatch, setting: Setting, bars: Sequence[Bar] = ()) -> Finding:
    """Time whole steps: tokens/s, MFU, memory, and the host's time to launch forward and backward."""
    warmup, steps = (1, 1) if setting.rehearse else (_WARMUP, _STEPS)
    on_cuda = run.env.device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    whole, passes, host = [], [], []
    for _ in range(warmup + steps):
        run.synchronize()
        started = time.perf_counter()
        loss = run.replica.pipeline.train(batch)
        launched = time.perf_counter()
        run.synchronize()
        passed = time.perf_counter()
        run.replica.engine.step()
        run.replica.balance.step()
        run.synchronize()
        whole.append(time.perf_counter() - started)
        passes.append(passed - started)
        host.append(launched - started)
    step_s, passes_s, host_s = (statistics.median(times[warmup:]) for times in (whole, passes, host))
    flops = step_flops(run.config, **batch.counts).model
    peak = peak_flops(torch.cuda.get_device_name()) if on_cuda else None
    mfu = flops / step_s / peak if peak else None
    memory = torch.cuda.max_memory_allocated() if on_cuda else None
    values = {
        "tokens_per_s": batch.tokens / step_s,
        "step_s": step_s,
        "steps_s": whole[warmup:],
        "forward_backward_s": passes_s,
        "host_s": host_s,
        "flops_per_s": flops / step_s,
        "mfu": mfu,
        "memory_bytes": memory,
        "loss": loss.item(),
        "documents": len(batch.micro_batches[0].cu_seqlens) - 1,
    }
    verdict, missed = judge(bars, values)
    found = missed if torch.isfinite(loss) else [f"the loss is {loss.item()}", *missed]
    of_peak = f"MFU {mfu:.1%} of {peak / 1e12:.0f} TFLOP/s" if mfu else f"{flops / step_s / 1e12:.3g} TFLOP/s"
    used = f", {memory / 2**30:.1f} GiB" if memory else ""
    return Finding(
        f"{batch.tokens / step_s:,.0f} tokens/s, {of_peak}, step {step_s * 1e3:,.0f} ms (forward and backward "
        f"{passes_s * 1e3:,.0f}, launched in {host_s * 1e3:,.0f}){used}{verdict}",
        values,
        failures=found,
    )


def kernels(run: Run, batch: StepBatch, profile: Profile, setting: Setting, must_keep_ahead: bool) -> Finding:
    """What one micro-batch launches, and whether the host or the device bounds it; with `must_keep_ahead` it fails
    where the host does."""
    one = one_micro_batch(batch)
    with Traffic() as traffic:
        run.passes(one)
    run.synchronize()
    wall_s = median_wall_s(lambda: run.passes(one), run.synchronize, 1 if setting.rehearse else 5)
    bound = "device" if profile.seconds > 0.9 * wall_s else "host"
    kernel = "operations" if setting.rehearse else "kernels"
    rows = [
        (f"`{name[:120]}`", count, f"{milliseconds:.2f}", f"{share:.1%}")
        for name, count, milliseconds, share in profile.dearest()
    ]
    return Finding(
        f"{len(profile.kernels):,} {kernel}, {profile.seconds * 1e3:.1f} ms of device time in {wall_s * 1e3:.1f} ms "
        f"({bound}-bound); {traffic.operations:,} operations read and write {traffic.bytes / 1e9:.1f} GB",
        {
            "kernels": len(profile.kernels),
            "device_s": profile.seconds,
            "wall_s": wall_s,
            "bound": bound,
            "operations": traffic.operations,
            "bytes": traffic.bytes,
        },
        [Table(f"the ten {kernel} with the most device time", (kernel, "count", "ms", "share"), rows)],
        ["the device waits for the host"] if must_keep_ahead and bound == "host" else (),
    )


def products(run: Run, batch: StepBatch, profile: Profile, setting: Setting) -> Finding:
    """Every matrix product of a micro-batch beside what its shape reaches alone."""
    with Traffic() as traffic:
        run.passes(one_micro_batch(batch))
    run.synchronize()
    if not setting.rehearse:
        torch.cuda.empty_cache()
    alone = ceilings(traffic, 0 if setting.rehearse else LEAST_FLOPS, run.env.device)
    found = gather(profile.products, traffic, alone)
    major = 0 if setting.rehearse else torch.cuda.get_device_capability()[0]
    rows = [
        (
            str(product),
            product.calls,
            f"{product.calls * product.seconds * 1e3:.2f}",
            f"{product.rate / 1e12:.3g}",
            f"{product.ceiling / 1e12:.3g}" if product.ceiling else "",
            f"{product.share:.0%}" if product.share else "",
            product.alignment_bytes,
            f"`{product.kernels[0][:80]}`",
        )
        for product in found[:_ROWS]
    ]
    timed = [product for product in found if product.share is not None]
    worst = min(timed, key=lambda product: product.share, default=None)
    seconds = sum(product.calls * product.seconds for product in found)
    flops = sum(product.calls * product.flops for product in found)
    line = f"{len(found)} products, {seconds * 1e3:.1f} ms, {flops / seconds / 1e12:.3g} TFLOP/s" if seconds else "none"
    if worst is not None:
        line += f"; worst of {len(timed)} with a ceiling {worst.share:.0%}, {worst}"
    if setting.rehearse:
        line += "; not judged on a CPU"
    columns = ("product", "calls", "ms", "TFLOP/s", "alone", "share", "operands on bytes", "kernel")
    bad = failures(found, major)
    return Finding(
        line,
        {"seconds": seconds, "worst_share": worst.share if worst else None, "failures": bad},
        [Table("matrix products", columns, rows)],
        [f"{len(bad)} of {len(found)} products: {bad[0]}"] if bad else (),
    )


def waits(run: Run, batch: StepBatch, setting: Setting) -> Finding:
    """Where the host waits for the device, in a micro-batch and in the optimizer step."""
    if setting.rehearse:
        raise Skipped("not on a CPU")
    passes = waits_of(lambda: run.passes(one_micro_batch(batch)))
    step = waits_of(run.replica.engine.step)
    line = f"{sum(passes.values())} in a micro-batch, {sum(step.values())} in the optimizer step"
    rows = [
        (where, place, count)
        for where, found in (("micro-batch", passes), ("optimizer step", step))
        for place, count in found.items()
    ]
    shown = [Table("places where the host waits for the device", ("in", "line", "times"), rows)] if rows else []
    return Finding(line, {"micro_batch": passes, "step": step}, shown)


def towers(run: Run) -> Finding:
    """Whether a text step runs the towers or their backward."""
    batch = one_micro_batch(run.packs("text"))
    found = tower_work(run.replica.stages[0], lambda: run.passes(batch))
    run.synchronize()
    spent = ", ".join(f"{count} {what}" for what, count in found.items())
    failures = [f"a text micro-batch computes in the towers: {spent}"] if found else []
    return Finding("" if found else "nothing is computed in them", dict(found), failures=failures)
