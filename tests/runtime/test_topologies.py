"""The table of topologies: each trains as one process does.

Five steps, text and multimodal in turn, images unevenly spread over packs (some micro-batches and ranks have none).
Compared are the loss and the global gradient norm of each step, and every parameter after the last one; of models with
routed experts also how many tokens went to each expert, and the biases of the routers.
"""

import itertools
from functools import cache

import pytest
import torch

from tests.pool import Pool
from tests.runtime.cases import VL2, Trained, initial_weights, merge, run_config, train, train_each

# Of the 7B in small: world, parallel, train.
TABLE = [
    (1, {"zero": 0}, {"recompute": "full"}),
    (1, {"zero": 1}, {"micro_batch": 3}),
    (1, {"zero": 3}, {"micro_batch": 4}),
    (2, {"zero": 0}, {"micro_batch": 2}),
    (2, {"zero": 1}, {"micro_batch": 3}),
    (2, {"zero": 3}, {"micro_batch": 6, "recompute": "full"}),
    (2, {"tensor": 2, "sequence": True}, {"micro_batch": 2}),
    (2, {"tensor": 2, "vision": "sharded"}, {"micro_batch": 3}),
    (2, {"pipeline": 2, "virtual_stages": 3}, {"recompute": "full"}),
    (3, {"zero": 2}, {"micro_batch": 2}),
    (3, {"tensor": 3, "sequence": True}, {"micro_batch": 4, "recompute": "full"}),
    (3, {"pipeline": 3}, {"micro_batch": 2}),
    (4, {"pipeline": 2, "stages": (3, 9), "zero": 0}, {}),
    (4, {"tensor": 2, "zero": 3}, {"micro_batch": 6}),
    (4, {"tensor": 4, "vision": "sharded", "zero": 0}, {"micro_batch": 4}),
    (4, {"tensor": 2, "sequence": True, "pipeline": 2, "vision": "sharded"}, {"micro_batch": 6, "recompute": "full"}),
    (6, {"tensor": 3, "sequence": True, "zero": 2}, {"micro_batch": 3}),
    (6, {"tensor": 2, "pipeline": 3}, {"micro_batch": 2}),
    (8, {"pipeline": 4, "zero": 0}, {}),
]
# Of the VL2 models in small, by world: model, parallel, train. The ranks of a world start once for all its rows.
VL2_TABLE = {
    1: [
        ("base", {"zero": 0}, {"micro_batch": 4, "recompute": "full"}),
    ],
    2: [
        ("tiny", {"expert": 2, "zero": 0}, {"micro_batch": 6}),
        ("base", {"expert": 2, "zero": 2}, {"micro_batch": 3, "recompute": "full"}),
        ("base", {"tensor": 2, "expert_width": "whole"}, {"micro_batch": 6}),
        ("small", {"tensor": 2, "sequence": True, "expert_width": "cut"}, {"micro_batch": 6, "recompute": "full"}),
        ("small", {"zero": 3}, {"micro_batch": 6}),
    ],
    4: [
        ("small", {"expert": 2}, {"micro_batch": 3}),
        ("tiny", {"expert": 4}, {"micro_batch": 3, "recompute": "full"}),
        ("base", {"tensor": 2, "expert": 2, "zero": 0}, {"micro_batch": 6}),
        ("base", {"tensor": 2, "expert": 2, "expert_width": "cut"}, {"micro_batch": 6}),
        ("small", {"tensor": 2, "sequence": True, "expert": 2, "vision": "sharded"}, {"micro_batch": 6}),
        ("tiny", {"pipeline": 2, "expert": 2, "stages": (1, 5), "zero": 0}, {"micro_batch": 3}),
        ("base", {"pipeline": 2, "virtual_stages": 3, "expert": 2}, {"micro_batch": 3, "recompute": "full"}),
    ],
    8: [
        (
            "base",
            {"tensor": 2, "sequence": True, "pipeline": 2, "expert": 2, "expert_width": "cut", "vision": "sharded"},
            {"micro_batch": 3, "recompute": "full"},
        ),
        ("small", {"pipeline": 2, "virtual_stages": 3, "expert": 4, "zero": 0}, {"micro_batch": 1}),
        ("tiny", {"tensor": 2, "expert": 4}, {"micro_batch": 3}),
    ],
}
BALANCE = {
    "tiny": {"auxiliary_weight": 0.5},
    "small": {"auxiliary_weight": 0.5},
    "base": {"auxiliary_weight": 0.1, "bias_step": 0.05},
}
# Parameter rules, and two topologies for each: a stage then trains nothing, or a tensor rank nothing of its own.
TOWERS_FROZEN = [{"match": r"^stem\.(siglip|sam)\.", "lr_multiplier": 0.0}, {"match": r"sam\.(neck|downsamples)"}]
RULES = {
    "towers frozen but for the convolutions": TOWERS_FROZEN,
    "only the adaptor trains": [{"match": ".*", "lr_multiplier": 0.0}, {"match": "adaptor"}],
    "only the head trains": [{"match": ".*", "lr_multiplier": 0.0}, {"match": "^head"}],
    "learning-rate multipliers": [{"match": "^stem", "lr_multiplier": 0.1}, {"match": "down_proj", "lr_multiplier": 3}],
}
RULE_TABLE = [
    (4, {"tensor": 2, "sequence": True, "pipeline": 2}, {"micro_batch": 3}),
    (4, {"pipeline": 2, "virtual_stages": 3, "zero": 0}, {"micro_batch": 3}),
    (2, {"zero": 3}, {"micro_batch": 6}),
]
# Where tensor ranks share the images, gradients of the towers cross ranks: of those that train, and no others.
SHARED = (2, {"tensor": 2, "vision": "sharded"}, {"micro_batch": 6})
RULE_CASES = [*itertools.product(RULE_TABLE, RULES), (SHARED, "towers frozen but for the convolutions")]
# The same of experts: all frozen as in stage 1 of DeepSeek-VL2, or a part, and a router that is slower than they are.
VL2_RULES = {
    "only the stem trains": [{"match": ".*", "lr_multiplier": 0.0}, {"match": "^stem"}],
    "only the head trains": RULES["only the head trains"],
    "experts of several kinds": [
        {"match": "experts.gate_proj", "lr_multiplier": 0.0},
        {"match": "experts.up_proj", "lr_multiplier": 3},
        {"match": "router", "lr_multiplier": 0.1},
    ],
}
VL2_RULE_TABLE = [
    ("base", {"tensor": 2, "expert": 2, "zero": 0}, {"micro_batch": 6}),
    ("base", {"pipeline": 2, "expert": 2}, {"micro_batch": 3}),
]
BF16_TABLE = [
    (2, {"zero": 1}, {"micro_batch": 6}),
    (3, {"zero": 2}, {"micro_batch": 4}),
    (2, {"zero": 3}, {"micro_batch": 6}),
    (4, {"pipeline": 2, "virtual_stages": 2}, {"micro_batch": 3, "recompute": "full"}),
    (4, {"tensor": 2, "sequence": True, "pipeline": 2}, {"micro_batch": 3}),
]
# Rounding decides between two experts that are almost as good; a bias, which moves by a sign, would magnify that.
VL2_BF16_TABLE = [
    ("tiny", {"tensor": 2, "expert": 2, "expert_width": "cut"}, {"micro_batch": 6, "recompute": "full"}),
    ("small", {"pipeline": 2, "expert": 2}, {"micro_batch": 3}),
]


def name(row) -> str:
    return " ".join(f"{key}={value}" for key, value in ({"world": row[0]} | row[1] | row[2]).items())


def optim(precision: str, rules: list[dict]) -> dict:
    """bf16 takes smaller steps: rounding would grow with every step as any difference does at a large learning rate."""
    return {"rules": rules, "lr": 1e-3 if precision == "bf16" else 1e-2}


def vl2_config(world: int, row, precision: str = "fp32", rule: str | None = None):
    model, parallel, options = row
    return run_config(
        world,
        model=VL2[model],
        optim=optim(precision, VL2_RULES[rule] if rule else []),
        train=options | {"precision": precision},
        parallel=parallel,
        balance=BALANCE[model],
    )


@cache
def one_process(precision: str, rule: str | None) -> Trained:
    """What the single process comes to."""
    config = run_config(optim=optim(precision, RULES[rule] if rule else []), train={"precision": precision})
    (trained,) = Pool().run(1, train, config)
    return trained


@cache
def one_vl2_process(model: str, precision: str, rule: str | None) -> Trained:
    (trained,) = Pool().run(1, train, vl2_config(1, (model, {}, {"micro_batch": 3}), precision, rule))
    return trained


def errors_of(results: list[Trained], expected: Trained) -> tuple[float, float, float]:
    """Worst relative error of losses, of gradient norms, and worst absolute error of the weights."""
    assert all(trained.history == results[0].history for trained in results), "ranks disagree about a loss or a norm"
    # A text step gives the adaptor no gradient: where it alone trains, the norm must be zero as well.
    errors = [
        [abs(ours - theirs) / max(theirs, 1e-9) for ours, theirs in zip(step, expected_step, strict=True)]
        for step, expected_step in zip(results[0].history, expected.history, strict=True)
    ]
    weights = merge([trained.weights for trained in results])
    assert weights.keys() == expected.weights.keys()
    weight_error = max((weights[key] - expected.weights[key]).abs().max().item() for key in weights)
    return max(loss for loss, _ in errors), max(norm for _, norm in errors), weight_error


def compare(pool: Pool, row, precision: str = "fp32", rule: str | None = None) -> tuple[float, float, float]:
    world, parallel, options = row
    config = run_config(
        world,
        optim=optim(precision, RULES[rule] if rule else []),
        train=options | {"precision": precision},
        parallel=parallel,
    )
    return errors_of(pool.run(world, train, config), one_process(precision, rule))


def show(record_property, errors, label: str = "") -> None:
    for kind, error in zip(("loss", "norm", "weights"), errors, strict=True):
        record_property(f"{label} {kind}".strip(), f"{error:.1e}")
    print(label, " ".join(f"{error:.1e}" for error in errors))


def same_choices(trained: Trained, expected: Trained) -> bool:
    """Whether every expert had the same tokens in every step, so that the biases are the same to the bit."""
    return all(
        torch.equal(ours.tokens, theirs.tokens) and (ours.bias is None or torch.equal(ours.bias, theirs.bias))
        for ours, theirs in zip(trained.loads, expected.loads, strict=True)
    )


@pytest.mark.parametrize("row", TABLE, ids=name)
def test_fp32_equals_one_process(pool, record_property, row):
    errors = compare(pool, row)
    show(record_property, errors)
    loss, norm, weights = errors
    assert loss < 1e-6  # measured 2.1e-7
    assert norm < 1e-5  # measured 2.9e-6
    assert weights < 1e-5  # measured 1.0e-6, of weights up to 1


def check_experts(pool, record_property, world: int, runs: list[tuple]) -> None:
    """runs: (row, rule) for each of a world."""
    by_rank = pool.run(world, train_each, [vl2_config(world, row, rule=rule) for row, rule in runs])
    for (row, rule), results in zip(runs, zip(*by_rank, strict=True), strict=True):
        expected = one_vl2_process(row[0], "fp32", rule)
        label = " ".join((row[0], name((world, *row[1:])), rule or ""))
        errors = errors_of(results, expected)
        show(record_property, errors, label)
        loss, norm, weights = errors
        assert loss < 1e-6, label  # measured 2.1e-7
        assert norm < 1e-5, label  # measured 2.0e-6
        assert weights < 1e-5, label  # measured 2.9e-6
        assert same_choices(results[0], expected), label
        auxiliary = torch.stack([load.auxiliary for load in results[0].loads])
        expected_auxiliary = torch.stack([load.auxiliary for load in expected.loads])
        assert (auxiliary - expected_auxiliary).abs().max() < 1e-6, label  # measured 2.4e-7, of losses around 1


@pytest.mark.parametrize("world", VL2_TABLE)
def test_experts_equal_one_process(pool, record_property, world):
    check_experts(pool, record_property, world, [(row, None) for row in VL2_TABLE[world]])


def test_experts_under_parameter_rules_equal_one_process(pool, record_property):
    check_experts(pool, record_property, 4, list(itertools.product(VL2_RULE_TABLE, VL2_RULES)))


@pytest.mark.parametrize(
    ("row", "rule"), RULE_CASES, ids=lambda value: value if isinstance(value, str) else name(value)
)
def test_parameter_rules_equal_one_process(pool, record_property, row, rule):
    errors = compare(pool, row, rule=rule)
    show(record_property, errors)
    loss, norm, weights = errors
    assert loss < 1e-6  # measured 2.1e-7
    assert norm < 1e-5  # measured 2.9e-6
    assert weights < 1e-5  # measured 1.0e-6, of weights up to 1


@pytest.mark.parametrize("row", BF16_TABLE, ids=name)
def test_bf16_equals_one_process_within_its_rounding(pool, record_property, row):
    errors = compare(pool, row, precision="bf16")
    show(record_property, errors)
    loss, norm, _ = errors
    assert loss < 5e-4  # measured 7.2e-5
    assert norm < 3e-2  # measured 1.3e-2


def test_experts_in_bf16_equal_one_process_within_its_rounding(pool, record_property):
    by_rank = pool.run(4, train_each, [vl2_config(4, row, "bf16") for row in VL2_BF16_TABLE])
    for row, results in zip(VL2_BF16_TABLE, zip(*by_rank, strict=True), strict=True):
        errors = errors_of(results, one_vl2_process(row[0], "bf16", None))
        show(record_property, errors, row[0])
        loss, norm, _ = errors
        assert loss < 5e-4  # measured 1.0e-4
        assert norm < 3e-2  # measured 6.7e-3


def test_frozen_parameters_do_not_move():
    everything, trained = one_process("fp32", None).weights, one_process("fp32", "only the adaptor trains").weights
    (start,) = Pool().run(1, initial_weights, run_config())
    moved = {key for key in trained if not torch.equal(trained[key], start[key])}
    assert moved == {key for key in trained if "adaptor" in key}
    assert all(not torch.equal(everything[key], start[key]) for key in everything)
