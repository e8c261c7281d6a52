"""Which implementation serves each op on a device, and why. Decided once, at start, and told to the user."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megavl.ops.attention import PackedAttention
from megavl.ops.candidates import CANDIDATES, REFERENCE, Unavailable
from megavl.ops.cross_entropy import CrossEntropy
from megavl.ops.expert_mlp import ExpertMlp
from megavl.ops.grouped import GroupedLinear
from megavl.ops.permutation import Permutation
from megavl.ops.products import products
from megavl.ops.rope import RotateHalves, RotateLatent
from megavl.ops.router import RouterLogits
from megavl.ops.trial import Result, Results

AUTO = "auto"
# The candidates of the first op are built from the implementations of the others.
_LAYER, _PARTS = "expert_mlp", ("grouped_linear", "swiglu")
# Ops whose reference Inductor fuses with what is next to them.
_FUSIBLE = ("rms_norm", "swiglu", "rotary")


class OpsError(ValueError):
    """An implementation that the configuration names does not serve this device."""


@dataclass(frozen=True)
class Ops:
    """The implementation of each op.

    products: the context that forward and backward passes run in
    lines: one per op, what serves it and why
    """

    attention: PackedAttention
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    swiglu: Callable[[Tensor, Tensor], Tensor]
    rotate_halves: RotateHalves
    rotate_latent: RotateLatent
    cross_entropy: CrossEntropy
    router_logits: RouterLogits
    permutation: Permutation
    grouped_linear: GroupedLinear
    expert_mlp: ExpertMlp
    products: AbstractContextManager
    lines: tuple[str, ...]


@dataclass(frozen=True)
class _Available:
    """The candidates of an op that serve a device, by name in order of preference, and why the others do not."""

    implementations: Mapping[str, Any]
    reasons: Mapping[str, str]


def _available(op: str, device: torch.device) -> _Available:
    implementations, reasons = {}, {}
    for candidate in CANDIDATES[op]:
        try:
            implementations[candidate.name] = candidate.load(device)
        except Unavailable as reason:
            reasons[candidate.name] = str(reason)
    return _Available(implementations, reasons)


def choose(
    device: torch.device,
    wanted: Iterable[tuple[str, str]] = (),
    trial: Callable[[Mapping[str, Mapping[str, Any]], Sequence[str]], Results] | None = None,
    compiles: bool = False,
) -> Ops:
    """The implementation of each op.

    Args:
        device: where the ops run
        wanted: pairs of op and candidate, such as those of `OpsConfig`; an op that is "auto" or not named gets the
            first candidate that serves the device, or the fastest one of the trial
        trial: tries the candidates of the ops that are "auto", as `Trial` does; None tries nothing. It is called twice,
            because the layer of the experts is tried with the grouped products and the activation that were chosen
        compiles: the blocks are compiled: norms, rotation and activation outside of the routed experts are then
            "torch" where they are "auto"

    Raises:
        OpsError: a candidate that is wanted does not serve the device
        KeyError: no op or no candidate has this name
    """
    available = {op: _available(op, device) for op in CANDIDATES}
    forced = {op: name for op, name in wanted if name != AUTO}
    _refuse_unavailable(forced, available)

    def choose_each(ops: Mapping[str, _Available], parts: Sequence[str] = ()) -> dict[str, tuple[str, str]]:
        free = {op: each.implementations for op, each in ops.items() if op not in forced}
        results = {} if trial is None else trial(free, parts)
        return {
            op: (forced[op], f"forced by ops.{op}") if op in forced else _choice(op, each, results.get(op, ()))
            for op, each in ops.items()
        }

    makers = available.pop(_LAYER)
    choices = choose_each(available)
    chosen = {op: available[op].implementations[name] for op, (name, _) in choices.items()}
    parts = [chosen[part] for part in _PARTS]
    layers = {name: make(*parts) for name, make in makers.implementations.items()}
    choices |= choose_each({_LAYER: _Available(layers, makers.reasons)}, [choices[part][0] for part in _PARTS])
    if compiles:  # after the layer of the experts, which is not compiled
        fused = [op for op in _FUSIBLE if op not in forced]
        choices |= dict.fromkeys(fused, (REFERENCE, "compiled with its neighbours"))
        chosen |= {op: available[op].implementations[REFERENCE] for op in fused}
    product_context, products_line = products(device)
    return Ops(
        attention=chosen["attention"],
        rms_norm=chosen["rms_norm"].rms_norm,
        add_rms_norm=chosen["rms_norm"].add_rms_norm,
        swiglu=chosen["swiglu"],
        rotate_halves=chosen["rotary"].halves,
        rotate_latent=chosen["rotary"].latent,
        cross_entropy=chosen["cross_entropy"],
        router_logits=chosen["router"],
        permutation=chosen["permutation"],
        grouped_linear=chosen["grouped_linear"],
        expert_mlp=layers[choices[_LAYER][0]],
        products=product_context,
        lines=(
            *(_line(op, name, why) for op, (name, why) in choices.items()),
            f"matrix products: {products_line}",
        ),
    )


def _refuse_unavailable(forced: Mapping[str, str], available: Mapping[str, _Available]) -> None:
    """Raise OpsError with everything that is forced and not available."""
    problems = [
        f"ops.{op} = {name} cannot serve this run: {available[op].reasons[name]}; available are "
        f"{', '.join((*available[op].implementations, AUTO))}"
        for op, name in forced.items()
        if name not in available[op].implementations
    ]
    if problems:
        raise OpsError("\n".join(problems))


def _choice(op: str, available: _Available, results: Sequence[Result]) -> tuple[str, str]:
    """Name of the fastest candidate that has passed the trial, or of the preferred one without a trial; and why."""
    if not results:
        name = next(iter(available.implementations))
        before = [candidate.name for candidate in CANDIDATES[op]]
        before = before[: before.index(name)]
        return name, "; ".join(f"{other}: {available.reasons[other]}" for other in before) or _only(op)
    here = [result for result in results if result.name in available.implementations]
    passed = [result for result in here if result.fault is None and result.seconds is not None]
    name = min(passed, key=lambda result: result.seconds).name if passed else REFERENCE
    reasons = [_account(result) for result in sorted(here, key=lambda result: result.name != name)]
    reasons += [f"{other}: {reason}" for other, reason in available.reasons.items()]
    return name, "; ".join(filter(None, reasons))


def _only(op: str) -> str:
    return "no other implementation" if len(CANDIDATES[op]) == 1 else ""


def _account(result: Result) -> str:
    """What the trial says of a candidate."""
    time = None if result.seconds is None else f"{result.seconds * 1e3:.3g} ms forward and backward"
    said = ", ".join(filter(None, (result.fault, time)))
    return f"{result.name}: {said}" if said else ""


def _line(op: str, name: str, why: str) -> str:
    words = next(candidate.words for candidate in CANDIDATES[op] if candidate.name == name)
    return f"{op}: {words} ({why})" if why else f"{op}: {words}"
