"""The plan of a run as text: stages, bubbles, memory, messages and FLOPs (`launch/pretrain.py --dry-run`)."""

from megavl.config.run import RunConfig
from megavl.config.stages import split_layers
from megavl.plan.cost import Count, active_parameters, item_parameters, item_work
from megavl.plan.expected_work import expected_work, step_timeline
from megavl.plan.fit import memory_problem
from megavl.plan.hardware import peak_flops, usable_bytes
from megavl.plan.mix import expected_steps
from megavl.plan.peak import StepMemory, rank_peaks
from megavl.plan.schedule import rank_of
from megavl.plan.split import split_model
from megavl.plan.table import table
from megavl.plan.timeline import equal_stages_bubble
from megavl.plan.traffic import rank_traffic

# A rank with more than this many times the mean work gets a remark.
_UNEVEN = 1.1
RECOMPUTE = ("off", "selective", "block")


def describe(config: RunConfig, world: int) -> str:
    """The plan of a run on `world` ranks, as text for a console.

    The configuration must have passed `megavl.config.rules.check` for that world.
    """
    sections = [_run(config, world), _stages(config, world)]
    if config.parallel.pipeline > 1:
        sections.append(_pipeline(config, world))
    sections += [_memory(config, world), _traffic(config, world), _work(config)]
    return "\n\n".join(filter(None, sections))


def _run(config: RunConfig, world: int) -> str:
    parallel, train, seq_len = config.parallel, config.train, config.data.seq_len
    dp, tokens = world // parallel.model, train.global_batch * seq_len
    micro_batches = train.micro_batches(dp)
    uncut = config.model_copy(update={"parallel": parallel.model_copy(update={"tensor": 1, "expert": 1})})
    parameters = sum(item_parameters(uncut), start=Count())
    counts = f"parameters: {parameters.total:,} = {parameters.trainable:,} trainable + {parameters.frozen:,} frozen"
    experts = ""
    if config.model.decoder.moe is not None:
        counts += " (the biases of routers among these)" * (config.model.decoder.moe.router == "sigmoid")
        counts += (
            f"\nactive: {active_parameters(config.model):,} of them, with the routed experts of one token and without "
            "the token embedding"
        )
        experts = f" (experts over {parallel.expert}, {parallel.expert_width})"
    tensor = f"tensor {parallel.tensor}" + (" (sequence parallel)" if parallel.sequence else "")
    return "\n".join(
        (
            f"{config.model.name} on {world} ranks: {tensor} x pipeline {parallel.pipeline} x data {dp}"
            f"{experts}, ZeRO-{parallel.zero}, {train.precision}, recompute {train.recompute}"
            + (", towers recomputed" if train.recompute_towers else ""),
            counts,
            f"step: {train.global_batch} packs of {seq_len} tokens = {tokens:,} tokens; each rank runs {micro_batches} "
            f"micro-batches of {train.micro_batch * seq_len:,} tokens",
            f"run: {train.steps:,} steps = {train.steps * tokens:,} tokens",
        )
    )


def _stages(config: RunConfig, world: int) -> str:
    parallel, stages = config.parallel, split_model(config, world)
    items, (text, multimodal) = item_parameters(config), expected_work(config)
    rows = [("stage", "pp rank", "items", "trainable", "frozen", "text step", "multimodal step")]
    for stage, held in enumerate(stages):
        parameters = sum((items[item] for item in held), start=Count())
        rows.append(
            (
                str(stage),
                str(rank_of(stage, parallel)),
                items_of(held, config.model.layers),
                _millions(parameters.trainable),
                _millions(parameters.frozen),
                *(f"{step.load(held) / step.load(range(len(items))):.1%}" for step in (text, multimodal)),
            )
        )
    _, step = expected_steps(config)
    origin = ", chosen to balance the work" if parallel.stages == "auto" else ""
    if parallel.encodes_ahead:
        encoding = parallel.pipeline * multimodal.towers.both
        share = encoding / (encoding + multimodal.load(range(len(items))))
        origin += f", images encoded before the passes ({share:.1%} of a multimodal step)"
    caption = (
        f"Stages{origin}: parameters on one rank, and share of a step's FLOPs (vision: {parallel.vision}).\n"
        f"Taken for it: packs of one document of {config.data.seq_len} tokens, in a multimodal step with {step.images} "
        f"images ({step.tiles // config.train.global_batch} tiles) each"
        + (", and equally busy experts." if config.model.decoder.moe else ".")
    )
    return f"{caption}\n{table(rows)}"


def _pipeline(config: RunConfig, world: int) -> str:
    """How full the schedule keeps the ranks, simulated without time for messages."""
    parallel, micro_batches = config.parallel, config.train.micro_batches(world // config.parallel.model)
    splits = {"as above": split_model(config, world)}
    if parallel.stages is not None and config.model.layers % parallel.num_stages == 0:
        equal = parallel.model_copy(update={"stages": None})
        splits["equal numbers of items"] = split_layers(config.model.layers, equal)
    device = parallel.device
    rows, remarks = (
        [("step", "of the steps", "stages", "bubble", "busiest rank / mean", *(("s",) if device else ()))],
        [],
    )
    for step in expected_work(config):
        encoding = micro_batches * step.towers.both
        for name, stages in splits.items():
            timeline = step_timeline(parallel, stages, step, micro_batches)
            busiest = max(timeline.busy) / (sum(timeline.busy) / len(timeline.busy))
            bubble, flops = timeline.bubble_beside(encoding), timeline.seconds + encoding
            seconds = (f"{flops / peak_flops(device.upper()):.2f}",) if device else ()
            rows.append((step.name, f"{step.share:.0%}", name, f"{bubble:.1%}", f"{busiest:.2f}", *seconds))
            if name == "as above" and step.share and busiest > _UNEVEN:
                remarks.append(_remark(config, step.name, timeline.busy))
    caption = (
        f"Bubble of {parallel.schedule} with {micro_batches} micro-batches; it is "
        f"{equal_stages_bubble(parallel, micro_batches):.1%} if all stages take equally long."
    )
    if device:
        caption += f" Seconds are those at the peak rate of {device}, without messages: no run is faster."
    return "\n".join((caption, table(rows), *remarks))


def _remark(config: RunConfig, step: str, busy: tuple[float, ...]) -> str:
    """What to do about ranks that wait for the busiest."""
    most, least = busy.index(max(busy)), busy.index(min(busy))
    remedy = "parallel.stages=auto balances the stages"
    if step == "multimodal" and most == rank_of(0, config.parallel) and not config.parallel.encodes_ahead:
        remedy = "its stem encodes the images; parallel.vision=pipelined has all ranks encode them"
    elif config.parallel.stages == "auto":
        chosen = "have to fit parallel.device" if config.parallel.device else "are the best that there are"
        remedy = f"these stages {chosen}; try another parallel.pipeline, or parallel.virtual_stages"
    return (
        f"In a {step} step pp rank {least} has {min(busy) / max(busy):.0%} of the work of pp rank {most} and waits for "
        f"it: {remedy}."
    )


def _memory(config: RunConfig, world: int) -> str:
    """Peak of each rank as the run is configured, and under every kind of recomputation of the decoder."""
    parallel, dp, stages = config.parallel, world // config.parallel.model, split_model(config, world)
    peaks = {}
    for mode in RECOMPUTE:
        changed = config.model_copy(update={"train": config.train.model_copy(update={"recompute": mode})})
        peaks[mode] = rank_peaks([StepMemory(changed, world, step) for step in expected_steps(changed)], stages)
    device = parallel.device
    fits = ("fits",) if device else ()
    rows = [
        ("pp rank", "weights", "gradients", "optimizer", "activations", "workspace", "messages")
        + ("images", "encoding") * parallel.encodes_ahead
        + ("together", *(f"if {mode}" for mode in RECOMPUTE), *fits)
    ]
    for rank, peak in enumerate(peaks[config.train.recompute]):
        passes = peak.activations, peak.workspace, peak.messages
        cells = [peak.state.weights, peak.state.gradients, peak.state.optimizer, *passes]
        cells += [peak.images, peak.encoding] * parallel.encodes_ahead
        cells += [peak.total, *(peaks[mode][rank].total for mode in RECOMPUTE)]
        verdict = ("yes" if peak.total <= usable_bytes(device) else "NO",) if device else ()
        rows.append((str(rank), *map(_gib, cells), *verdict))
    replicas = f"; {dp // parallel.expert} for routed experts" if config.model.decoder.moe else ""
    caption = (
        f"Memory of one rank at the peak of a step, GiB (ZeRO-{parallel.zero} over {dp} data-parallel ranks"
        f"{replicas}), and with each kind of train.recompute on the same stages."
    )
    if device:
        caption += f" Of {device}, {usable_bytes(device) / 2**30:.1f} GiB are for the run."
    return "\n".join(filter(None, (caption, table(rows), memory_problem(config, world))))


def _traffic(config: RunConfig, world: int) -> str:
    axes = {
        "tensor": config.parallel.tensor > 1,
        "expert": config.parallel.expert > 1,
        "pipeline": config.parallel.pipeline > 1,
        "data": world > config.parallel.model,
        "images": config.parallel.encodes_ahead,
    }
    shown = [axis for axis, used in axes.items() if used]
    if not shown:
        return ""
    _, multimodal = expected_steps(config)
    rows = [("pp rank", *shown)]
    for rank, sent in enumerate(rank_traffic(config, world, multimodal)):
        rows.append((str(rank), *(_gib(sent.get(axis, 0)) for axis in shown)))
    return f"Messages that a rank sends in a multimodal step, GiB by axis (ring algorithms).\n{table(rows)}"


def _work(config: RunConfig) -> str:
    rows = [("FLOPs of a step", "forward", "input gradients", "weight gradients", "model", "overhead")]
    packs = config.train.global_batch
    for step in expected_steps(config):
        work = item_work(config, **step.counts(packs, packs))
        parts = ("forward", "input_grad", "weight_grad", "model", "overhead")
        rows.append((step.name, *(f"{sum(getattr(item, part) for item in work):.3e}" for part in parts)))
    return table(rows)


def items_of(held: range, layers: int) -> str:
    """ "stem, blocks 0-2" for the items of a stage."""
    blocks = [item - 1 for item in held if 0 < item < layers - 1]
    names = ["stem"] if 0 in held else []
    if blocks:
        names.append(f"block {blocks[0]}" if len(blocks) == 1 else f"blocks {blocks[0]}-{blocks[-1]}")
    return ", ".join(names + (["head"] if layers - 1 in held else []))


def _millions(count: int) -> str:
    return f"{count / 1e6:,.2f} M"


def _gib(size_bytes: float) -> str:
    return f"{size_bytes / 2**30:,.2f}"
