"""Bars: the least that a Hopper GPU must reach, on a slice with all of its blocks."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

_HOPPER = 9


@dataclass(frozen=True)
class Bar:
    """The least of one value of a measurement.

    value: its name among the values
    least: the smallest number that passes
    words: how it is shown, a format of one number
    """

    value: str
    least: float
    words: str


def on_hopper(device: torch.device) -> bool:
    """Whether the bars are set for this card."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == _HOPPER


def judge(bars: Sequence[Bar], values: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Words on each bar for the line of a finding, and a failure for each missed bar. Missing values are not judged."""
    known = [bar for bar in bars if values.get(bar.value) is not None]
    said = [f"; bar {_shown(bar, bar.least)}: {'met' if not _missed(bar, values) else 'missed'}" for bar in known]
    return "".join(said), list(_failures(known, values))


def _failures(bars: Iterable[Bar], values: Mapping[str, Any]) -> Iterable[str]:
    for bar in bars:
        if _missed(bar, values):
            yield f"{_shown(bar, values[bar.value])} is below the bar of {_shown(bar, bar.least)}"


def _missed(bar: Bar, values: Mapping[str, Any]) -> bool:
    return not values[bar.value] >= bar.least  # NaN misses it


def _shown(bar: Bar, number: float) -> str:
    return bar.words.format(number)
