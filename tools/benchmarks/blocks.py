"""Kinds of decoder blocks: with a dense feed-forward layer, and with experts."""

from megavl.config.model import DecoderConfig


def kinds_of_blocks(decoder: DecoderConfig) -> dict[str, int]:
    """Index of the first block of each kind, "dense" before "experts"."""
    first = {"experts" if decoder.has_experts(layer) else "dense": layer for layer in reversed(range(decoder.layers))}
    return dict(sorted(first.items()))
