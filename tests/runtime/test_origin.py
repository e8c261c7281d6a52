"""A run that starts from a checkpoint draws no weights, and nothing of what was in their memory is left."""

import json
from unittest import mock

import pytest
import torch
from torch import nn

from megavl.config.model import ModelConfig
from megavl.config.run import RunConfig
from megavl.model.init import initialise, zero_buffers
from megavl.runtime.origin import Origin, find_origin
from megavl.runtime.replica import Replica
from tests.models import changed
from tests.runtime.cases import MODEL, VL2, Trained, merge, run_config, train

_BIAS = {"auxiliary_weight": 0.1, "bias_step": 0.05}
# World, options of the run: all levels of ZeRO, both precisions, frozen parameters, routers with biases.
RUNS = [
    (1, {"parallel": {"zero": 0}, "optim": {"rules": [{"match": "^stem.siglip", "lr_multiplier": 0.0}]}}),
    (2, {"parallel": {"zero": 1, "expert": 2}, "train": {"precision": "bf16"}, "model": VL2["base"], "balance": _BIAS}),
    (2, {"parallel": {"zero": 2}}),
    (2, {"parallel": {"zero": 3}, "train": {"precision": "bf16"}}),
]


def config_of(world: int, options: dict, steps: int, **changes) -> RunConfig:
    values = {"model": MODEL} | options
    train = {"micro_batch": 6, "steps": steps} | values.pop("train", {})
    return changed(run_config(world, train=train, **values), **changes)


def nan(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Uninitialised memory at its worst."""
    zero_buffers(model, config, seed)
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)


def train_over_nan(config: RunConfig, checkpoints: str) -> tuple[Trained, int]:
    """A run that reads a checkpoint, and how many parameters were drawn for it."""
    init = "megavl.model.init"
    with (
        mock.patch("megavl.runtime.origin.zero_buffers", nan),
        mock.patch(f"{init}._draw") as draw,
        mock.patch(f"{init}._draw_experts") as draw_experts,
    ):
        return train(config, checkpoints), draw.call_count + draw_experts.call_count


def train_without_asking(config: RunConfig, checkpoints: str) -> Trained:
    """A run that reads a checkpoint but for one of its parameters."""
    fragments = Replica.fragments
    with mock.patch.object(Replica, "fragments", lambda replica: fragments(replica)[1:]):
        return train(config, checkpoints)


def train_over_random(config: RunConfig, checkpoints: str) -> Trained:
    """The same with values drawn for every parameter first."""
    with mock.patch("megavl.runtime.origin.zero_buffers", initialise):
        return train(config, checkpoints)


@pytest.mark.parametrize(("world", "options", "start"), [*((*run, "resume") for run in RUNS), (*RUNS[1], "init_from")])
def test_nothing_is_drawn_for_a_checkpoint_to_overwrite(pool, tmp_path, world, options, start):
    saved = tmp_path / "saved"
    pool.run(world, train, config_of(world, options, steps=1), str(saved))
    results = []
    for run in (train_over_nan, train_over_random):
        if start == "resume":
            folder, config = tmp_path / run.__name__, config_of(world, options, steps=3)
            folder.mkdir()
            (folder / "step_00000001").symlink_to(saved / "step_00000001")
        else:
            folder = tmp_path / run.__name__
            config = config_of(world, options, steps=2, checkpoint={"init_from": str(saved)})
        results.append(pool.run(world, run, config, str(folder)))
    drawn = [count for _, count in results[0]]
    assert drawn == [0] * world
    over_nan, over_random = [trained for trained, _ in results[0]], results[1]
    assert [one.history for one in over_nan] == [one.history for one in over_random]
    assert len(over_nan[0].history) == 2
    ours, theirs = (merge([one.weights for one in trained]) for trained in (over_nan, over_random))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_parameter_that_the_checkpoint_lacks_ends_the_run(pool, tmp_path):
    world, options = RUNS[0]
    pool.run(world, train, config_of(world, options, steps=1), str(tmp_path))
    manifest = tmp_path / "step_00000001" / "state.json"
    state = json.loads(manifest.read_text())
    del state["tensors"]["param.stem.siglip.pos_embed"]
    manifest.write_text(json.dumps(state))
    with pytest.raises(Exception, match="lacks param.stem.siglip.pos_embed, which this run needs"):
        pool.run(world, train_over_nan, config_of(world, options, steps=2), str(tmp_path))


def test_a_parameter_that_is_not_read_would_be_noticed(pool, tmp_path):
    """The checkpoint has it, but this run does not ask for it."""
    world, options = RUNS[0]
    pool.run(world, train, config_of(world, options, steps=1), str(tmp_path))
    with pytest.raises(Exception, match="also holds .*, which this run does not have"):
        pool.run(world, train_without_asking, config_of(world, options, steps=2), str(tmp_path))


def test_a_new_run_draws_its_weights(tmp_path):
    config = run_config()
    assert find_origin(config, tmp_path, None) == Origin(None, None)
    assert Origin(None, None).initialise is initialise
    assert Origin(tmp_path, None).initialise is Origin(None, "elsewhere").initialise is zero_buffers


def test_a_checkpoint_of_the_run_comes_before_another_runs(tmp_path):
    (tmp_path / "step_00000003").mkdir()
    config = changed(run_config(), checkpoint={"init_from": "elsewhere"})
    assert find_origin(config, tmp_path, None) == Origin(tmp_path / "step_00000003", "elsewhere")
