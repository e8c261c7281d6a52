import pytest
import torch
from torch import nn

from megavl.config.run import OptimConfig, ScheduleConfig
from megavl.runtime.optim import Group, freeze, parameter_groups, schedule_ratio, set_learning_rate


def test_warm_up_is_linear_and_reaches_the_peak():
    schedule = ScheduleConfig(shape="constant", warmup_steps=4)
    assert [schedule_ratio(schedule, step, 10) for step in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


def test_cosine_falls_from_the_peak_to_its_final_ratio():
    schedule = ScheduleConfig(shape="cosine", warmup_steps=2, final_ratio=0.1)
    ratios = [schedule_ratio(schedule, step, 12) for step in range(2, 13)]
    assert ratios[0] == 1.0
    assert ratios[5] == pytest.approx(0.55)
    assert ratios[10] == pytest.approx(0.1)
    assert ratios == sorted(ratios, reverse=True)


def test_step_schedule_of_deepseek_llm():
    """Warm-up 2000, then 31.6 % after 80 % of the steps and 10 % after 90 %."""
    schedule = ScheduleConfig(shape="step", warmup_steps=2000)
    at = {step: schedule_ratio(schedule, step, 42000) for step in (1999, 2000, 33599, 33600, 37799, 37800, 41999)}
    assert at == {
        1999: pytest.approx(2000 / 2001),
        2000: 1.0,
        33599: 1.0,
        33600: 0.316,
        37799: 0.316,
        37800: 0.1,
        41999: 0.1,
    }


def test_parameters_are_frozen_and_grouped_by_name():
    optim = OptimConfig(
        lr=2.0,
        weight_decay=0.1,
        rules=[{"match": "tower", "lr_multiplier": 0.0}, {"match": "tower.neck", "lr_multiplier": 0.5}],
    )
    named = {
        "tower.weight": nn.Parameter(torch.zeros(2, 2)),
        "tower.neck.weight": nn.Parameter(torch.zeros(2, 2)),
        "block.weight": nn.Parameter(torch.zeros(2, 2)),
        "block.norm": nn.Parameter(torch.zeros(2)),
    }
    freeze(named.items(), optim)
    assert [name for name, parameter in named.items() if not parameter.requires_grad] == ["tower.weight"]
    anchors = {
        group: [nn.Parameter(torch.zeros(1))]
        for group in (Group(0.5, 0.1, False), Group(1.0, 0.0, False), Group(1.0, 0.1, False))
    }
    groups = parameter_groups(named.items(), anchors, optim)
    members = [[name for name, p in named.items() if any(p is q for q in group["params"])] for group in groups]
    assert members == [["tower.neck.weight"], ["block.norm"], ["block.weight"]]
    assert [len(group["params"]) for group in groups] == [2, 2, 2]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0, 0.1]
    set_learning_rate(torch.optim.AdamW(groups), 4.0)
    assert [group["lr"] for group in groups] == [2.0, 4.0, 4.0]
