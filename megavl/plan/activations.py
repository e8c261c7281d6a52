"""Activation memory of a micro-batch on one rank, from the configuration alone.

What autograd keeps from the forward to the backward pass is found operation by operation, by autograd's own rules: an
operation without a trainable parameter at or before it keeps nothing, and a frozen weight does not keep its input.
Routed experts are taken to be equally busy, and the operators to be those of a GPU with torch and Triton.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megavl.config.run import RunConfig
from megavl.plan.forward import operations
from megavl.plan.operators import FP32_BYTES
from megavl.plan.tape import Operation, Storage, backward_peak, forward_peak, kept
from megavl.plan.vision import StemRecorder


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch on one rank.

    kept:       in use from the forward to the backward pass, for each micro-batch in flight
    computed:   at most in use in addition while the forward pass runs: activations that are not kept
    recomputed: at most in use in addition while the backward pass runs: activations that are computed again, gradients
                of activations and of weights

    A rank runs one forward or backward pass at a time, so of its items the largest `computed` or `recomputed` counts.
    """

    kept: int
    computed: int
    recomputed: int


def item_activations(config: RunConfig, *, tokens: int, supervised_tokens: int, tiles: int) -> tuple[Activations, ...]:
    """Activations of each item of the model list: stem, decoder blocks, head.

    `kept` includes the output of an item, which the next one reads, and not its input. A stage that does not begin with
    the stem holds its input too, and each stage what `layout_bytes` counts. The arguments are those of `operations`.
    """
    items = operations(config, tokens=tokens, supervised_tokens=supervised_tokens, tiles=tiles)
    by_item: list[set[Storage]] = [set() for _ in items]
    for storage in kept(operation for item in items for operation in item):
        if storage.item is not None:
            by_item[storage.item].add(storage)
    return tuple(_activations(number, item, by_item[number]) for number, item in enumerate(items))


def tile_activations(config: RunConfig, tiles: int) -> Activations:
    """Activations of `tiles` tiles that a rank encodes before the passes (`ParallelConfig.encodes_ahead`).

    `kept` includes the features. The stem of such a run has no activations of towers, and `item_activations` does not
    count the features, which are its input.
    """
    encoder = StemRecorder(config, tokens=0, tiles=tiles)
    features = encoder.encode_ahead()
    saved = kept(encoder.tape.operations)
    held = saved | {features.storage}
    return Activations(
        _bytes(held),
        max(0, forward_peak(encoder.tape.operations) - _bytes(held)),
        backward_peak(encoder.tape.operations) - _bytes(saved),
    )


def _activations(number: int, item: Sequence[Operation], held: set[Storage]) -> Activations:
    """Activations of an item that holds `held`."""
    saved = kept(item)
    inputs = {x.storage for operation in item for x in operation.inputs if x.storage.item != number}
    return Activations(
        _bytes(held),
        max(0, forward_peak(item) - _bytes(held | saved | inputs)),
        backward_peak(item) - _bytes(saved),
    )


def _bytes(storages: set[Storage]) -> int:
    return sum(storage.bytes for storage in storages)


def hidden_bytes(config: RunConfig, tokens: int) -> int:
    """Hidden states between two items on one rank, which is also a message of the pipeline."""
    parallel = config.parallel
    rows = tokens // parallel.tensor if parallel.sequence else tokens
    return rows * config.model.decoder.width * config.train.element_bytes


def feature_bytes(config: RunConfig, tiles: int) -> int:
    """Features of tiles, or their gradients."""
    return tiles * config.model.tile_features * config.model.decoder.width * config.train.element_bytes


def layout_bytes(config: RunConfig, tokens: int) -> int:
    """Tables of rotary positions, which the blocks of a stage share."""
    decoder = config.model.decoder
    width = decoder.head_width if decoder.mla is None else decoder.mla.rope_width
    return tokens * width * FP32_BYTES
