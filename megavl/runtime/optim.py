"""AdamW over the trainable parameters, and its learning rate over the steps (DeepSeek-VL Table 4)."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from megavl.config.parameters import parameters
from megavl.config.run import OptimConfig, RunConfig, ScheduleConfig
from megavl.parallel.shard import shard_of


def freeze(named_parameters: Iterable[tuple[str, nn.Parameter]], optim: OptimConfig) -> None:
    """Switch gradients off where the rules say so: per parameter, not per module (the paper's adaptor includes
    convolutions that live inside a frozen tower)."""
    for name, parameter in named_parameters:
        parameter.requires_grad_(optim.lr_multiplier(name) > 0)


@dataclass(frozen=True, order=True)
class Group:
    """What the parameters of one optimizer group have in common."""

    lr_multiplier: float
    weight_decay: float
    experts: bool


def _group(name: str, dims: int, experts: bool, optim: OptimConfig) -> Group:
    """Vectors (norms, biases) do not decay; routed experts, whose replicas are on other ranks, are by themselves."""
    return Group(optim.lr_multiplier(name), optim.weight_decay if dims > 1 else 0.0, experts)


def groups_of(config: RunConfig) -> list[Group]:
    """The optimizer groups of the whole model, in an order that every rank agrees on."""
    found = {
        _group(parameter.name, len(parameter.shape), parameter.expert_dim is not None, config.optim)
        for parameter in parameters(config.model)
        if parameter.trained
    }
    return sorted(group for group in found if group.lr_multiplier > 0)


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    anchors: Mapping[Group, list[nn.Parameter]],
    optim: OptimConfig,
) -> list[dict]:
    """This rank's trainable parameters by group, each begun by its anchors: DeepSpeed drops empty groups and reduces
    the gradient norm group by group, so all ranks must have the same ones."""
    members = {group: list(parameters) for group, parameters in anchors.items()}
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            members[_group(name, parameter.dim(), shard_of(parameter).over("ep"), optim)].append(parameter)
    return [
        {
            "params": parameters,
            "lr": optim.lr * group.lr_multiplier,
            "lr_multiplier": group.lr_multiplier,
            "weight_decay": group.weight_decay,
            "experts": group.experts,
        }
        for group, parameters in members.items()
    ]


def schedule_ratio(schedule: ScheduleConfig, step: int, steps: int) -> float:
    """Learning rate of optimizer step `step` (from 0) of `steps`, over the peak.

    Warm-up is linear and reaches the peak at step `warmup_steps`. "step" is DeepSeek-LLM's multi-step schedule
    (arXiv 2401.02954, section 2.3), its milestones fractions of all steps.
    """
    if step < schedule.warmup_steps:
        return (step + 1) / (schedule.warmup_steps + 1)
    match schedule.shape:
        case "constant":
            return 1.0
        case "cosine":
            done = (step - schedule.warmup_steps) / max(1, steps - schedule.warmup_steps)
            return schedule.final_ratio + (1 - schedule.final_ratio) * 0.5 * (1 + math.cos(math.pi * done))
        case "step":
            passed = sum(step >= milestone * steps for milestone in schedule.milestones)
            return schedule.ratios[passed - 1] if passed else 1.0


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group its share of `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_multiplier"]
