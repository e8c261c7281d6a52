"""Messages against the collectives of the real stages, forward and backward."""

from collections import Counter

import pytest

from megavl.plan.cost import item_parameters
from megavl.plan.message import Message
from megavl.plan.mix import expected_steps
from megavl.plan.traffic import border_messages, data_messages, item_traffic, rank_traffic
from tests.config.runs import make_run
from tests.plan.test_activations import BLOCKS, SEQUENCE, run_of

CASES = {
    "sequence, sharded": ("vl_7b", SEQUENCE | {"vision": "sharded"}, "block"),
    "sequence, selective": ("vl_7b", SEQUENCE, "selective"),
    "tensor": ("vl_7b", {"tensor": 2}, "block"),
    "experts": ("vl2_tiny", {"expert": 2}, "block"),
    "experts, whole": ("vl2_small", SEQUENCE | {"expert": 2}, "selective"),
    "experts, whole, replicated tokens": ("vl2_base", {"tensor": 2}, "block"),
    "experts, cut": ("vl2_base", SEQUENCE | {"expert_width": "cut"}, "selective"),
    "experts, cut, block": ("vl2_small", SEQUENCE | {"expert_width": "cut"}, "block"),
    "experts, cut, replicated tokens": ("vl2_tiny", {"tensor": 2, "expert_width": "cut"}, "off"),
}


@pytest.mark.parametrize("case", CASES)
def test_messages_of_every_item(case):
    """Kind, axis and bytes of each, exactly."""
    pytest.importorskip("triton")
    from tests.plan.fake_stage import make_batch, messages

    preset, parallel, mode = CASES[case]
    config = run_of(preset, parallel=parallel, train={"recompute": mode})
    batch = make_batch(config, 1, document=512)
    found = item_traffic(config, tokens=len(batch.tokens), supervised_tokens=len(batch.supervised), tiles=batch.tiles)
    total = 0
    for item, traffic in enumerate(found):
        forward, backward = messages(config, batch, item)
        assert Counter(traffic.forward) == Counter(forward), item
        assert Counter(traffic.backward) == Counter(backward), item
        total += len(forward) + len(backward)
    assert total >= 4 * BLOCKS  # the collectives were seen


def test_bytes_of_the_ring_algorithms():
    assert [Message("tensor", kind, 800, 4).sent for kind in ("all_reduce", "all_gather", "reduce_scatter")] == [
        1200,
        600,
        600,
    ]
    assert Message("expert", "all_to_all", 800, 4).sent == 600
    assert Message("pipeline", "send", 800, 4).sent == 800


def test_the_pipeline_sends_hidden_states_and_their_gradients():
    config = make_run(parallel={"pipeline": 4}, train={"precision": "bf16"})
    size = 192 * config.model.decoder.width * 2
    assert [sum(message.sent for message in border_messages(config, stage, 192)) for stage in range(4)] == [
        size,
        2 * size,
        2 * size,
        size,
    ]


@pytest.mark.parametrize(
    ("zero", "kinds"),
    [
        (1, {"reduce_scatter": 1, "all_gather": 1}),
        (2, {"reduce_scatter": 3, "all_gather": 1}),
        (3, {"reduce_scatter": 3, "all_gather": 6}),
    ],
)
def test_the_data_axis_by_stage_of_zero(zero, kinds):
    config = make_run(parallel={"zero": zero})
    parameters = item_parameters(config)[1]
    found = data_messages(config, parameters, dp=4, micro_batches=3)
    assert Counter(message.kind for message in found) == kinds
    assert {message.bytes for message in found if message.kind == "reduce_scatter"} == {4 * parameters.trainable}


def test_a_rank_sends_what_its_items_do():
    config = make_run(parallel={"pipeline": 2, "tensor": 2, "sequence": True})
    _, step = expected_steps(config)
    first, last = rank_traffic(config, 8, step)
    counts = step.counts(1, config.train.global_batch)
    items = item_traffic(config, **{name: counts[name] for name in ("tokens", "supervised_tokens", "tiles")})
    micro_batches = config.train.micro_batches(2)
    sent = sum(message.sent for item in items for message in item.messages if message.axis == "tensor")
    assert first["tensor"] + last["tensor"] == pytest.approx(micro_batches * sent)
    assert first["pipeline"] == last["pipeline"] == micro_batches * 96 * config.model.decoder.width * 2
    assert first["data"] > 0 and set(first) == {"tensor", "pipeline", "data"}
