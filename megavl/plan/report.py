"""What a run would look like, without a device: for `launch/pretrain.py --dry-run`."""

from collections.abc import Iterable

from megavl.config.run import RunConfig
from megavl.config.stages import split_layers
from megavl.config.tiles import Tiling
from megavl.plan.cost import Count, active_parameters, item_parameters, item_work
from megavl.plan.memory import state_bytes
from megavl.plan.schedule import rank_of, stages_of


def describe(config: RunConfig, world: int) -> str:
    """Stages, parameters, work and memory of a run on `world` ranks, as text for a console.

    The configuration must have passed `megavl.config.rules.check` for that world.
    """
    return "\n\n".join((_run(config, world), _stages(config), _ranks(config, world), _work(config)))


def _run(config: RunConfig, world: int) -> str:
    parallel, train, seq_len = config.parallel, config.train, config.data.seq_len
    dp, tokens = world // parallel.model, train.global_batch * seq_len
    micro_batches = train.micro_batches(dp)
    uncut = config.model_copy(update={"parallel": parallel.model_copy(update={"tensor": 1, "expert": 1})})
    parameters = _add(item_parameters(uncut))
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


def _stages(config: RunConfig) -> str:
    parallel, stages = config.parallel, split_layers(config.model.layers, config.parallel)
    items = item_parameters(config)
    text, multimodal = (_rank_flops(config, step) for step in (_text_step(config), _multimodal_step(config)))
    rows = [("stage", "pp rank", "items", "trainable", "frozen", "text step", "multimodal step")]
    for stage, held in enumerate(stages):
        parameters = _add(items[item] for item in held)
        rows.append(
            (
                str(stage),
                str(rank_of(stage, parallel)),
                _items(held, config.model.layers),
                _millions(parameters.trainable),
                _millions(parameters.frozen),
                _share(text, held),
                _share(multimodal, held),
            )
        )
    images, tiles = _images_per_pack(config)
    caption = (
        f"Stages: parameters on one rank, and share of a step's FLOPs (vision: {parallel.vision}).\n"
        f"Taken for it: packs of one document of {config.data.seq_len} tokens, in a multimodal step with {images} "
        f"images ({tiles} tiles) each" + (", and equally busy experts." if config.model.decoder.moe else ".")
    )
    return f"{caption}\n{_table(rows)}"


def _ranks(config: RunConfig, world: int) -> str:
    parallel, items = config.parallel, item_parameters(config)
    stages, dp = split_layers(config.model.layers, parallel), world // parallel.model
    rows = [("pp rank", "parameters", "weights", "gradients", "optimizer", "together")]
    for rank in range(parallel.pipeline):
        held = _add(items[item] for stage in stages_of(rank, parallel) for item in stages[stage])
        state = state_bytes(config, held, dp)
        sizes = map(_mib, (state.weights, state.gradients, state.optimizer, state.total))
        rows.append((str(rank), _millions(held.total), *sizes))
    replicas = f"; {dp // parallel.expert} for routed experts" if config.model.decoder.moe else ""
    caption = f"Memory of one rank, without activations (ZeRO-{parallel.zero} over {dp} data-parallel ranks{replicas})."
    return f"{caption}\n{_table(rows)}"


def _work(config: RunConfig) -> str:
    rows = [("FLOPs of a step", "forward", "input gradients", "weight gradients", "model", "overhead")]
    for name, step in (("text", _text_step(config)), ("multimodal", _multimodal_step(config))):
        work = item_work(config, **step)
        parts = ("forward", "input_grad", "weight_grad", "model", "overhead")
        rows.append((name, *(f"{sum(getattr(item, part) for item in work):.3e}" for part in parts)))
    return _table(rows)


def _text_step(config: RunConfig) -> dict[str, int]:
    """A step whose packs are each one document."""
    packs, seq_len = config.train.global_batch, config.data.seq_len
    tokens = packs * seq_len
    return {
        "tokens": tokens,
        "supervised_tokens": tokens - packs,
        "squared_tokens": packs * seq_len**2,
        "tiles": 0,
    }


def _multimodal_step(config: RunConfig) -> dict[str, int]:
    """The same with images, whose tokens are no labels."""
    (images, tiles), packs, step = _images_per_pack(config), config.train.global_batch, _text_step(config)
    placeholders = packs * images * int(Tiling(config.model).tokens[0])
    return step | {"supervised_tokens": step["supervised_tokens"] - placeholders, "tiles": packs * tiles}


def _images_per_pack(config: RunConfig) -> tuple[int, int]:
    """As many small images as fill half of a pack, and their tiles."""
    tiling = Tiling(config.model)
    images = max(1, config.data.seq_len // 2 // int(tiling.tokens[0]))
    return images, images * int(tiling.tiles[0])


def _rank_flops(config: RunConfig, step: dict[str, int]) -> list[float]:
    """FLOPs of each item on one tensor rank."""
    tensor = config.parallel.tensor
    return [work.on_tensor_ranks(tensor) / tensor for work in item_work(config, **step)]


def _add(counts: Iterable[Count]) -> Count:
    counts = tuple(counts)
    return Count(*(sum(getattr(count, part) for count in counts) for part in ("trainable", "frozen", "experts")))


def _items(held: range, layers: int) -> str:
    """ "stem, blocks 0-2" for the items of a stage."""
    blocks = [item - 1 for item in held if 0 < item < layers - 1]
    names = ["stem"] if 0 in held else []
    if blocks:
        names.append(f"block {blocks[0]}" if len(blocks) == 1 else f"blocks {blocks[0]}-{blocks[-1]}")
    return ", ".join(names + (["head"] if layers - 1 in held else []))


def _share(flops: list[float], held: range) -> str:
    return f"{sum(flops[item] for item in held) / sum(flops):.1%}"


def _millions(count: int) -> str:
    return f"{count / 1e6:,.2f} M"


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:,.1f} MiB"


def _table(rows: list[tuple[str, ...]]) -> str:
    """Columns aligned to the right, under a heading and a line."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    heading, *lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join((heading, "-" * len(heading), *lines))
