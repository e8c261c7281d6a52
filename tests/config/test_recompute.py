"""When tiles are encoded a second time for the backward pass."""

import pytest

from megavl.config.recompute import encodes_again
from tests.config.runs import make_run

FREEZE_ALL = {"match": ".*", "lr_multiplier": 0.0}


def again(*trained: str, vision: str = "pipelined", recompute_towers: bool = True) -> bool:
    """Of the small hybrid run where only what matches trains."""
    return encodes_again(
        make_run(
            parallel={"vision": vision},
            train={"recompute_towers": recompute_towers},
            optim={"rules": [FREEZE_ALL, *({"match": match} for match in trained)]},
        )
    )


@pytest.mark.parametrize(
    "trained",
    [
        r"siglip.blocks.1.mlp.fc2.bias",
        "siglip.pos_embed",
        "siglip.patch_embed.bias",
        "sam.blocks.0.attn.rel_pos_h",
        "sam.pos_embed",
    ],
)
def test_where_a_block_of_a_tower_needs_a_gradient(trained):
    assert again(trained)


@pytest.mark.parametrize("trained", ["sam.neck", "siglip.norm", "sam.downsamples", "adaptor", "^blocks"])
def test_not_for_what_comes_after_the_blocks(trained):
    assert not again(trained)


def test_not_within_the_first_stage_nor_without_being_asked():
    assert again("sam.blocks", vision="balanced")
    assert not again("sam.blocks", vision="replicated")
    assert not again("sam.blocks", recompute_towers=False)
