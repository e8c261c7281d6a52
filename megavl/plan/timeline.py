"""Timeline of a training step: when each pass runs on each pipeline rank, and the bubble that this leaves."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from megavl.config.run import ParallelConfig
from megavl.plan.schedule import Pass, programs


class Span(NamedTuple):
    """One pass and when it runs, in seconds after the start of the step."""

    action: Pass
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """Passes of a step on every pipeline rank.

    spans: of each rank, in the order in which it runs them
    """

    spans: tuple[tuple[Span, ...], ...]

    @property
    def seconds(self) -> float:
        """From the first pass to the end of the last."""
        return max((of_rank[-1].end for of_rank in self.spans if of_rank), default=0.0)

    @property
    def busy(self) -> tuple[float, ...]:
        """Seconds that each rank spends in passes."""
        return tuple(sum(each.end - each.start for each in of_rank) for of_rank in self.spans)

    @property
    def bubble(self) -> float:
        """Share of the time of all ranks in which they wait, in [0, 1)."""
        return self.bubble_beside(0.0)

    def bubble_beside(self, seconds: float) -> float:
        """The bubble of a step in which all ranks also work for `seconds` before or after these passes."""
        whole = self.seconds + seconds
        return 1 - (sum(self.busy) / len(self.spans) + seconds) / whole if whole else 0.0


def equal_stages_bubble(parallel: ParallelConfig, micro_batches: int) -> float:
    """Bubble if all stages take equally long, and backward passes twice as long as forward passes."""
    return simulate(parallel, micro_batches, lambda each: 1 if each.kind == "forward" else 2).bubble


def simulate(
    parallel: ParallelConfig,
    micro_batches: int,
    seconds: Callable[[Pass], float],
    *,
    message: float = 0.0,
    backward: bool = True,
) -> Timeline:
    """Timeline of the programs of a schedule.

    A pass starts once its rank is free and its input is there. Transfers run as on NCCL: the batches of a rank one
    after another, each after the pass before it, and as a whole once both ends of all its messages have begun.

    Args:
        parallel: a checked section of a run; its sizes and its schedule count
        micro_batches: of a step on each data-parallel rank
        seconds: that a pass takes. Any unit will do, such as FLOPs: the timeline is in the same
        message: time of a batch of transfers, in the unit of `seconds`
        backward: whether the step has backward passes

    Raises:
        ValueError: the order of passes cannot be performed.
    """
    rank_programs = programs(parallel, micro_batches, backward=backward)
    spans: list[list[Span]] = [[] for _ in rank_programs]
    positions = [0] * len(rank_programs)
    computed = [0.0] * len(rank_programs)  # end of each rank's last pass
    sent = [0.0] * len(rank_programs)  # end of its last batch
    arrives: dict[Pass, float] = {}
    begins: dict[tuple[Pass, int], float] = {}  # of a transfer, which its consumer tells, on each of its ranks

    def advance(rank: int) -> bool:
        """Perform the rank's next action, unless another rank has to go on first."""
        action = rank_programs[rank][positions[rank]]
        if isinstance(action, Pass):
            start = max(computed[rank], arrives.pop(action, 0.0))
            computed[rank] = start + seconds(action)
            spans[rank].append(Span(action, start, computed[rank]))
        else:
            begin = max(computed[rank], sent[rank])
            begins.update({(each.consumer, rank): begin for each in action})
            others = [begins.get((each.consumer, each.source + each.target - rank)) for each in action]
            if None in others:
                return False
            sent[rank] = max(begin, *others) + message
            arrives.update({each.consumer: sent[rank] for each in action if each.target == rank})
        positions[rank] += 1
        return True

    while waiting := [rank for rank, program in enumerate(rank_programs) if positions[rank] < len(program)]:
        for rank in waiting:
            while positions[rank] < len(rank_programs[rank]) and advance(rank):
                pass
    return Timeline(tuple(map(tuple, spans)))
