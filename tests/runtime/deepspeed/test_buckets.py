"""Buckets: each parameter once and in its order, siblings together, filled from the end of the model."""

import pytest
import torch
from torch import nn

from megavl.runtime.deepspeed.buckets import bucketed, least_elements

SIZES = {"stem.embedding.weight": 50}
for block in range(3):
    SIZES |= {f"blocks.{block}.{part}": size for part, size in (("attn.q.weight", 30), ("attn.k.weight", 10))}
    SIZES |= {f"blocks.{block}.mlp.up.weight": 60, f"blocks.{block}.mlp.experts.up": 100}


def cut(least: int | None) -> list[tuple[str, list[str]]]:
    """Kind and names of the parameters of each bucket; experts are a group of their own, in buckets from 100 on."""
    names = {nn.Parameter(torch.zeros(size)): name for name, size in SIZES.items()}
    experts = [parameter for parameter, name in names.items() if "experts" in name]
    others = [parameter for parameter, name in names.items() if "experts" not in name]
    anchors = [nn.Parameter(torch.zeros(64)) for _ in range(3)]
    groups = [
        {"params": [*anchors[:2], *others], "kind": "others"},
        {"params": [anchors[2], *experts], "kind": "experts"},
    ]
    buckets = bucketed(groups, names, lambda group: 100 if group["kind"] == "experts" else least)
    return [(bucket["kind"], [names.get(each, "anchor") for each in bucket["params"]]) for bucket in buckets]


def block(number: int) -> list[str]:
    return [f"blocks.{number}.{part}.weight" for part in ("attn.q", "attn.k", "mlp.up")]


def test_buckets_are_filled_from_the_end_and_ordered_as_the_model():
    assert cut(100) == [
        ("others", ["anchor", "anchor", "stem.embedding.weight"]),
        ("others", block(0)),
        ("experts", ["anchor", "blocks.0.mlp.experts.up"]),
        ("others", block(1)),
        ("experts", ["blocks.1.mlp.experts.up"]),
        ("others", block(2)),
        ("experts", ["blocks.2.mlp.experts.up"]),
    ]


@pytest.mark.parametrize("least", [1, 45, 70, 130, 1000])
def test_siblings_stay_together(least):
    buckets = [names for kind, names in cut(least) if kind == "others"]
    assert sum(buckets, start=[]) == ["anchor", "anchor", *(name for name in SIZES if "experts" not in name)]
    for number in range(3):
        q, k, _ = block(number)
        assert sum(q in names and k in names for names in buckets) == 1
    sizes = [sum(SIZES.get(name, 0) for name in names) for names in buckets]
    assert all(size >= least for size in sizes[1:])


def test_a_group_that_is_not_reduced_is_not_cut():
    assert [names for kind, names in cut(None) if kind == "others"] == [names for _, names in cut(1000)[:1]]


def test_many_ranks_have_large_buckets():
    assert (least_elements(2), least_elements(32), least_elements(512)) == (40_000_000, 40_000_000, 512_000_000)
