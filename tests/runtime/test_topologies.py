"""The table of topologies: each trains as one process does.

Five steps, text and multimodal in turn, images unevenly spread over packs (some micro-batches and ranks have none).
Compared are the loss and the global gradient norm of each step, and every parameter after the last one.
"""

import itertools
from functools import cache

import pytest
import torch

from tests.pool import Pool
from tests.runtime.cases import initial_weights, merge, run_config, train

# world, parallel, train
TABLE = [
    (1, {"zero": 0}, {"recompute": "full"}),
    (1, {"zero": 1}, {"micro_batch": 3}),
    (1, {"zero": 3}, {"micro_batch": 4}),
    (2, {"zero": 0}, {"micro_batch": 2}),
    (2, {"zero": 1}, {"micro_batch": 3}),
    (2, {"zero": 3}, {"micro_batch": 6, "recompute": "full"}),
    (2, {"tensor": 2, "zero": 0}, {}),
    (2, {"tensor": 2, "sequence": True}, {"micro_batch": 2}),
    (2, {"tensor": 2, "vision": "sharded"}, {"micro_batch": 3}),
    (2, {"pipeline": 2, "zero": 0}, {}),
    (2, {"pipeline": 2, "virtual_stages": 3}, {"recompute": "full"}),
    (3, {"zero": 2}, {"micro_batch": 2}),
    (3, {"tensor": 3, "sequence": True}, {"micro_batch": 4, "recompute": "full"}),
    (3, {"pipeline": 3}, {"micro_batch": 2}),
    (4, {"pipeline": 2, "virtual_stages": 2, "zero": 1}, {"micro_batch": 3}),
    (4, {"pipeline": 2, "stages": (3, 9), "zero": 0}, {}),
    (4, {"tensor": 2, "sequence": True, "pipeline": 2}, {"micro_batch": 3, "recompute": "full"}),
    (4, {"tensor": 2, "zero": 3}, {"micro_batch": 6}),
    (4, {"tensor": 4}, {"micro_batch": 6}),
    (4, {"tensor": 4, "vision": "sharded", "zero": 0}, {"micro_batch": 4}),
    (4, {"tensor": 2, "sequence": True, "pipeline": 2, "vision": "sharded"}, {"micro_batch": 6, "recompute": "full"}),
    (6, {"tensor": 3, "sequence": True, "zero": 2}, {"micro_batch": 3}),
    (6, {"tensor": 2, "pipeline": 3}, {"micro_batch": 2}),
    (8, {"tensor": 2, "sequence": True, "pipeline": 2, "zero": 1}, {"micro_batch": 2}),
    (8, {"pipeline": 4, "zero": 0}, {}),
]
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
BF16_TABLE = [
    (2, {"zero": 1}, {"micro_batch": 6}),
    (3, {"zero": 2}, {"micro_batch": 4}),
    (2, {"zero": 3}, {"micro_batch": 6}),
    (4, {"pipeline": 2, "virtual_stages": 2}, {"micro_batch": 3}),
    (4, {"tensor": 2, "sequence": True, "pipeline": 2}, {"micro_batch": 3}),
]


def name(row) -> str:
    return " ".join(f"{key}={value}" for key, value in ({"world": row[0]} | row[1] | row[2]).items())


def optim(precision: str, rule: str | None) -> dict:
    """bf16 takes smaller steps: rounding would grow with every step as any difference does at a large learning rate."""
    return {"rules": RULES[rule] if rule else [], "lr": 1e-3 if precision == "bf16" else 1e-2}


@cache
def one_process(precision: str, rule: str | None):
    """History and weights of the single process."""
    config = run_config(optim=optim(precision, rule), train={"precision": precision})
    ((history, weights),) = Pool().run(1, train, config)
    return history, weights


def compare(pool: Pool, row, precision: str = "fp32", rule: str | None = None) -> tuple[float, float, float]:
    """Worst relative error of losses, of gradient norms, and worst absolute error of the weights."""
    world, parallel, options = row
    config = run_config(
        world, optim=optim(precision, rule), train=options | {"precision": precision}, parallel=parallel
    )
    results = pool.run(world, train, config)
    expected_history, expected_weights = one_process(precision, rule)
    histories = [history for history, _ in results]
    assert all(history == histories[0] for history in histories), "ranks disagree about a loss or a gradient norm"
    # A text step gives the adaptor no gradient: where it alone trains, the norm must be zero as well.
    errors = [
        [abs(ours - theirs) / max(theirs, 1e-9) for ours, theirs in zip(step, expected, strict=True)]
        for step, expected in zip(histories[0], expected_history, strict=True)
    ]
    weights = merge([held for _, held in results])
    assert weights.keys() == expected_weights.keys()
    weight_error = max((weights[key] - expected_weights[key]).abs().max().item() for key in weights)
    return max(loss for loss, _ in errors), max(norm for _, norm in errors), weight_error


def show(record_property, errors) -> None:
    for label, error in zip(("loss", "norm", "weights"), errors, strict=True):
        record_property(label, f"{error:.1e}")
    print(" ".join(f"{error:.1e}" for error in errors))


@pytest.mark.parametrize("row", TABLE, ids=name)
def test_fp32_equals_one_process(pool, record_property, row):
    errors = compare(pool, row)
    show(record_property, errors)
    loss, norm, weights = errors
    assert loss < 1e-6  # measured 2.1e-7
    assert norm < 1e-5  # measured 2.9e-6
    assert weights < 1e-5  # measured 1.0e-6, of weights up to 1


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


def test_frozen_parameters_do_not_move():
    _, everything = one_process("fp32", None)
    _, weights = one_process("fp32", "only the adaptor trains")
    (start,) = Pool().run(1, initial_weights, run_config())
    moved = {key for key in weights if not torch.equal(weights[key], start[key])}
    assert moved == {key for key in weights if "adaptor" in key}
    assert all(not torch.equal(everything[key], start[key]) for key in everything)
