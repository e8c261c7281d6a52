"""Durations of passes that sleep."""

import pytest
import torch
from torch import nn

from megavl.config.load import load_run
from megavl.plan.expected_work import expected_work
from megavl.plan.split import split_model


@pytest.fixture
def setting(tools):
    from benchmarks.sleeping import Setting

    overrides = ["parallel.pipeline=4", "train.global_batch=8", "parallel.tensor=1", "parallel.sequence=false"]
    planned = load_run("launch/recipes/vl_7b_stage2.yaml", overrides)
    return Setting("pipelined", planned, planned, split_model(planned, 4))


def test_passes_take_the_time_of_their_work(setting):
    from benchmarks.sleeping import durations

    _, multimodal = expected_work(setting.planned)
    found = durations(setting, multimodal, scale=2.0)
    assert sum(map(sum, found.stages)) == pytest.approx(2 * sum(item.both for item in multimodal.items))
    # 8 micro-batches of 3 tiles are 6 tiles on each of 4 ranks.
    assert 6 * sum(found.tile) == pytest.approx(2 * 8 * multimodal.towers.both)


def test_what_sleeps_does_so_in_both_passes(setting, monkeypatch):
    from benchmarks import sleeping

    slept = []
    monkeypatch.setattr("time.sleep", slept.append)
    x = torch.ones(3, requires_grad=True)
    y = sleeping._Sleep.apply(x, 1.5, 2.5)
    assert torch.equal(y, x) and slept == [1.5]
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones(3)) and slept == [1.5, 2.5]


def test_other_modules_do_not_sleep(setting, monkeypatch):
    from types import SimpleNamespace

    from benchmarks import sleeping

    slept = []
    monkeypatch.setattr("time.sleep", slept.append)
    mesh = SimpleNamespace(pp=SimpleNamespace(rank=0))
    replica = SimpleNamespace(config=setting.planned, mesh=mesh, stages=[object()])
    times = sleeping.Durations(((1.0, 2.0),) * 4, (1.0, 2.0))
    with sleeping.sleeping(replica, times):
        nn.Linear(2, 2)(torch.ones(2))
    assert slept == []
