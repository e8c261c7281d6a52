"""A run that is saved under one topology and resumed under another goes on as if nothing had happened."""

import pytest

from megavl.config.model import ModelConfig
from megavl.config.run import RunConfig
from tests.models import changed
from tests.runtime.cases import MODEL, VL2, initial_weights, merge, run_config, train

# Topology that saves after step 2, and the one that goes on: world, parallel, train.
CHANGES = [
    ((4, {"tensor": 2, "sequence": True, "pipeline": 2, "zero": 1}, {}), (2, {"zero": 1}, {"micro_batch": 3})),
    (
        (2, {"zero": 3}, {"micro_batch": 3}),
        (4, {"pipeline": 2, "schedule": "interleaved", "virtual_stages": 3, "zero": 1}, {}),
    ),
    ((3, {"zero": 1}, {"micro_batch": 4}), (2, {"tensor": 2, "zero": 0}, {"micro_batch": 3})),
    ((1, {"zero": 0}, {}), (3, {"zero": 2}, {"micro_batch": 4})),
    ((3, {"pipeline": 3, "zero": 0}, {}), (2, {"tensor": 2, "zero": 3}, {"micro_batch": 6})),
    (
        (4, {"pipeline": 2, "vision": "balanced"}, {"micro_batch": 3}),
        (4, {"tensor": 2, "pipeline": 2, "vision": "pipelined"}, {"micro_batch": 3, "recompute_towers": True}),
    ),
]
RULES = [{"match": "^stem.siglip", "lr_multiplier": 0.0}, {"match": "^stem.sam", "lr_multiplier": 0.1}]


# The same with routed experts and the biases of their routers.
EXPERT_CHANGES = [
    ((4, {"tensor": 2, "expert": 2, "expert_width": "cut"}, {"micro_batch": 6}), (1, {"zero": 0}, {"micro_batch": 6})),
    ((2, {"expert": 2, "zero": 2}, {"micro_batch": 3}), (4, {"expert": 4}, {"micro_batch": 3})),
    (
        (4, {"expert": 2, "pipeline": 2, "zero": 0}, {"micro_batch": 3}),
        (4, {"expert": 2, "tensor": 2, "sequence": True}, {"micro_batch": 6}),
    ),
]


def config_of(row, steps: int, precision: str, model: ModelConfig) -> RunConfig:
    world, parallel, options = row
    return run_config(
        world,
        model=model,
        parallel=parallel,
        train=options | {"steps": steps, "precision": precision},
        optim={"rules": RULES[: 2 if model.sam else 1], "lr": 1e-2},
        balance={"auxiliary_weight": 0.1, "bias_step": 0.05} if model.decoder.moe else {},
    )


def go(pool, row, checkpoints, steps: int, precision: str, model: ModelConfig = MODEL):
    world = row[0]
    config = config_of(row, steps, precision, model)
    results = pool.run(world, train, config, checkpoints)
    return results[0].history, merge([trained.weights for trained in results])


@pytest.fixture(scope="module")
def uninterrupted(pool):
    return go(pool, (1, {"zero": 1}, {}), None, 5, "fp32")


@pytest.fixture(scope="module")
def uninterrupted_experts(pool):
    return go(pool, (1, {"zero": 1}, {"micro_batch": 6}), None, 5, "fp32", VL2["base"])


@pytest.mark.parametrize(("before", "after"), CHANGES)
def test_fp32_goes_on_under_another_topology(pool, tmp_path, uninterrupted, before, after):
    go(pool, before, str(tmp_path), 2, "fp32")
    compare(go(pool, after, str(tmp_path), 5, "fp32"), uninterrupted)


@pytest.mark.parametrize(("before", "after"), EXPERT_CHANGES)
def test_experts_go_on_on_other_ranks(pool, tmp_path, uninterrupted_experts, before, after):
    go(pool, before, str(tmp_path), 2, "fp32", VL2["base"])
    history, weights = go(pool, after, str(tmp_path), 5, "fp32", VL2["base"])
    compare((history, weights), uninterrupted_experts)
    biases = {key for key in weights if key.endswith("router.bias")}
    assert biases == {f"blocks.{index}.mlp.router.bias" for index in (1, 2, 3)}
    assert all((weights[key] == uninterrupted_experts[1][key]).all() and weights[key].any() for key in biases)


def test_a_new_run_begins_with_the_experts_of_another(pool, tmp_path):
    before, after = EXPERT_CHANGES[1]
    _, expected = go(pool, before, str(tmp_path), 2, "fp32", VL2["base"])
    config = config_of(after, 2, "fp32", VL2["base"])
    weights = merge(pool.run(after[0], initial_weights, config, str(tmp_path)))
    assert all((weights[key] == expected[key]).all() for key in expected)


def compare(ours, expected) -> None:
    history, weights = ours
    expected_history, expected_weights = expected
    assert len(history) == 3
    for (loss, norm), (expected_loss, expected_norm) in zip(history, expected_history[2:], strict=True):
        assert abs(loss - expected_loss) / expected_loss < 1e-6
        assert abs(norm - expected_norm) / expected_norm < 1e-5
    worst = max((weights[key] - expected_weights[key]).abs().max().item() for key in weights)
    assert worst < 1e-4


def test_bf16_goes_on_bit_for_bit_under_the_same_topology(pool, tmp_path):
    """Masters, moments and the biases of routers are kept in fp32."""
    row = (2, {"expert": 2}, {"micro_batch": 3})
    expected_history, expected_weights = go(pool, row, None, 5, "bf16", VL2["base"])
    go(pool, row, str(tmp_path), 2, "bf16", VL2["base"])
    history, weights = go(pool, row, str(tmp_path), 5, "bf16", VL2["base"])
    assert history == expected_history[2:]
    assert all((weights[key] == expected_weights[key]).all() for key in weights)


def test_a_run_without_its_moments_would_be_noticed(pool, tmp_path, uninterrupted):
    """Negative control: weights alone are not enough to go on."""
    row = (1, {"zero": 1}, {})
    go(pool, row, str(tmp_path), 2, "fp32")
    config = changed(run_config(train={"steps": 5}, optim={"rules": RULES}), output_dir=str(tmp_path))
    ((history, _),) = pool.run(1, train_from_weights, config)
    assert abs(history[-1][0] - uninterrupted[0][-1][0]) > 1e-4


def train_from_weights(config):
    """Steps 2 to 4 from the weights of the checkpoint alone."""
    from pathlib import Path

    from megavl.checkpoint.layout import latest
    from megavl.checkpoint.load import load_weights
    from tests.runtime.cases import build, step_batch

    replica = build(config)
    load_weights(latest(Path(config.output_dir)), replica.fragments(), config.model, replica.mesh.control)
    steps = [replica.step(step_batch(step, config, replica.mesh), config.optim.lr) for step in range(2, 5)]
    return [(step.loss, step.grad_norm) for step in steps], {}
