import pytest

from megavl.checkpoint.error import CheckpointError
from megavl.checkpoint.maps.rule import rules
from megavl.config.dataflow import Parameter

NAMES = {
    "tower.": "vision.",
    "tower.embed.@": "vision.patches.@",
    "blocks.#.qkv.@": ("layers.#.q.@", "layers.#.k.@", "layers.#.v.@"),
    "blocks.#.experts": "layers.#.experts.*.weight",
}


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("tower.embed.bias", ("vision.patches.bias",)),
        ("tower.blocks.1.mlp.weight", ("vision.blocks.1.mlp.weight",)),
        ("tower.scale", ("vision.scale",)),
        ("blocks.7.qkv.weight", ("layers.7.q.weight", "layers.7.k.weight", "layers.7.v.weight")),
        ("blocks.7.experts", ("layers.7.experts.0.weight", "layers.7.experts.1.weight", "layers.7.experts.2.weight")),
    ],
)
def test_names(ours, theirs):
    (rule,) = rules([Parameter(ours, (3, 2), 0)], NAMES)
    assert rule.theirs == theirs


def test_a_parameter_without_a_name_is_refused():
    with pytest.raises(CheckpointError, match="no name for blocks.0.fc1.weight"):
        rules([Parameter("blocks.0.fc1.weight", (3, 2), 0)], NAMES)
