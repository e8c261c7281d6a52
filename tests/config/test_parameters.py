import pytest
import torch

from megavl.config.parameters import parameters
from megavl.config.presets import PRESETS
from megavl.config.run import ParallelConfig
from megavl.model.vlm import VLM
from megavl.ops.dispatch import choose
from megavl.parallel.groups import TensorAxis
from megavl.parallel.shard import shard_of


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("tensor", [1, 2])
def test_they_are_the_models_own(name, tensor):
    """Names, order, shapes and cuts of every parameter, full-size models included, item by item of the model list."""
    config = PRESETS[name]
    axis, ops = TensorAxis(size=tensor), choose(torch.device("cpu"))
    listed = parameters(config)
    for item in range(config.layers):
        with torch.device("meta"):
            part = VLM(config, axis, ops, item, item + 1)
        expected = {
            p.name: (p.shape, p.tensor_dim if tensor > 1 else None, p.local_size(ParallelConfig(tensor=tensor)))
            for p in listed
            if p.item == item
        }
        actual = {}
        for parameter_name, parameter in part.named_parameters():
            shard = shard_of(parameter)
            cut = shard.cuts[0].dim if shard.cuts and tensor > 1 else None
            actual[parameter_name] = (shard.full_shape(parameter.shape), cut, parameter.numel())
        assert actual == expected


def total(name: str, *prefixes: str) -> int:
    return sum(p.size for p in parameters(PRESETS[name]) if p.name.startswith(prefixes))


LLM = ("stem.embedding", "blocks", "head")


# Counts of the released weights: the language models and towers of DeepSeek-VL, without SigLIP's unused pooling head.
@pytest.mark.parametrize(
    ("name", "prefixes", "count"),
    [
        ("vl_1b", LLM, 1_652_656_128),
        ("vl_1b", ("stem.siglip",), 303_688_704),
        ("vl_1b", ("stem.sam",), 0),
        ("vl_1b", ("stem.adaptor",), 6_295_552),
        ("vl_7b", LLM, 6_910_365_696),
        ("vl_7b", ("stem.siglip",), 303_688_704),
        ("vl_7b", ("stem.sam",), 96_356_609),
        ("vl_7b", ("stem.sam.downsamples",), 5_898_240),
        ("vl_7b", ("stem.sam.neck",), 1_574_912),
        ("vl_7b", ("stem.adaptor",), 20_979_712),
        ("vl_7b", ("",), 7_331_390_721),
    ],
)
def test_published_counts(name, prefixes, count):
    assert total(name, *prefixes) == count
