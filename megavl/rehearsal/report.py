"""Memory, kernels and messages of one executed rank, as text for a console."""

from collections.abc import Sequence
from importlib.util import find_spec

from megavl.config.run import RunConfig
from megavl.plan.report import items_of
from megavl.plan.schedule import stages_of
from megavl.plan.split import split_model
from megavl.plan.table import table
from megavl.rehearsal.counts import Counts, Messages
from megavl.rehearsal.execute import Rehearsal, Step
from megavl.rehearsal.memory import KINDS, Peak


def describe(done: Rehearsal, config: RunConfig) -> str:
    """Memory by phase and kind, kernels and messages of the rank."""
    return "\n\n".join((_rank(done, config), _memory(done.peaks), _kernels(done.steps), _messages(done.steps)))


def _rank(done: Rehearsal, config: RunConfig) -> str:
    topology, (pp, dp, tp) = done.topology, done.topology.coordinates(done.rank)
    layers, slices = config.model.layers, split_model(config, topology.world)
    held = "; ".join(f"stage {stage}: {items_of(slices[stage], layers)}" for stage in stages_of(pp, config.parallel))
    first, *_ = done.steps
    size = config.train.micro_batch
    packs = f"{size} pack{'s' * (size > 1)} of {config.data.seq_len} tokens, one document each"
    if images := [step for step in done.steps if step.images]:
        packs += f", in a multimodal step with {images[0].images} images ({images[0].tiles} tiles) each"
    triton = "" if find_spec("triton") else "; Triton is not installed, so torch stands in for its kernels"
    return "\n".join(
        (
            f"{config.model.name}, rank {done.rank} of {topology.world}: pipeline {pp} of {topology.pp}, data {dp} of "
            f"{topology.dp}, tensor {tp} of {topology.tp}; {held}",
            f"A step: {first.micro_batches} micro-batches of {packs}"
            + (", and equally busy experts." if config.model.decoder.moe else "."),
            f"Executed on fake tensors, with the operators of an {done.gpu.name} without optional libraries{triton}:",
            *(f"  {line.partition(' (')[0]}" for line in done.lines),
        )
    )


def _memory(peaks: Sequence[Peak]) -> str:
    kinds = [kind for kind in KINDS if any(peak.bytes[kind] for peak in peaks)]
    rows = [("phase", *kinds, "together")]
    rows += [(peak.phase, *(_mib(peak.bytes[kind]) for kind in kinds), _mib(peak.total)) for peak in peaks]
    return f"Peak memory of each phase, MiB.\n{table(rows)}"


def _kernels(steps: Sequence[Step]) -> str:
    rows = [("step", "kernels a micro-batch", "of all passes", "of the optimizer", "GB read and written", "host reads")]
    for step in steps:
        passes, update = step.passes, step.update
        rows.append(
            (
                step.kind,
                f"{passes.kernels / step.micro_batches:,.1f}",
                f"{passes.kernels:,}",
                f"{update.kernels:,}",
                f"{(passes.bytes + update.bytes) / 1e9:,.1f}",
                f"{step.reads:,}",
            )
        )
    return f"Kernels of a step: calls of torch's operations that are no views, and of Triton kernels.\n{table(rows)}"


def _messages(steps: Sequence[Step]) -> str:
    found = [_together(step.passes, step.update) for step in steps]
    rows = [("axis", "operation", *(word for step in steps for word in (f"{step.kind} step", "MB")))]
    for axis, operation in dict.fromkeys(key for each in found for key in each):
        messages = [each.get((axis, operation), Messages()) for each in found]
        cells = (cell for each in messages for cell in (f"{each.count:,}", f"{each.bytes / 1e6:,.1f}"))
        rows.append((axis, operation, *cells))
    caption = "Messages of a step, with the size of whole tensors: what a reduce-scatter takes and an all-gather gives."
    return f"{caption}\n{table(rows)}" if len(rows) > 1 else "No messages."


def _together(*parts: Counts) -> dict[tuple[str, str], Messages]:
    total: dict[tuple[str, str], Messages] = {}
    for part in parts:
        for key, messages in part.messages.items():
            before = total.get(key, Messages())
            total[key] = Messages(before.count + messages.count, before.bytes + messages.bytes)
    return total


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:,.1f}"
