"""Paired measurement: works take turns, and each is compared with the first, round by round.

What else the machine does falls on all works of a round alike, so the ratio of two works in one round varies less than
either of their times.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Ratio:
    """Median, lowest and highest ratio of the rounds."""

    median: float
    lowest: float
    highest: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.lowest:.2f} to {self.highest:.2f})"


def take_turns(rounds: int, works: Mapping[str, Callable[[int], T]]) -> dict[str, list[T]]:
    """Results of each work by name, one for each round: A B A B. A work is called with the number of the round."""
    results: dict[str, list[T]] = {name: [] for name in works}
    for number in range(rounds):
        for name, work in works.items():
            results[name].append(work(number))
    return results


def paired_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Ratio | None:
    """Ratio of the values of each round. None where a denominator is 0, as the time of no work is."""
    if not all(denominators):
        return None
    each = [one / other for one, other in zip(numerators, denominators, strict=True)]
    return Ratio(statistics.median(each), min(each), max(each))
