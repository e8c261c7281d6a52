"""Work of the expected steps of a run, item by item of the model list, and the timeline that follows from it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from megavl.config.run import ParallelConfig, RunConfig
from megavl.plan.cost import PassFlops, item_passes
from megavl.plan.mix import expected_steps
from megavl.plan.timeline import Timeline, simulate


@dataclass(frozen=True)
class ExpectedWork:
    """What a micro-batch of an expected step costs on one tensor rank.

    name, share: as in `ExpectedStep`
    items:       of each item of the model list
    towers:      of this rank's share of the tiles, where they are encoded before the passes
    """

    name: str
    share: float
    items: tuple[PassFlops, ...]
    towers: PassFlops = PassFlops(0.0, 0.0)

    def passes(self, items: range) -> PassFlops:
        """FLOPs of the passes of a stage."""
        held = self.items[items.start : items.stop]
        return PassFlops(sum(item.forward for item in held), sum(item.backward for item in held))

    def load(self, items: range) -> float:
        """FLOPs of both passes of a stage together."""
        return self._sums[items.stop] - self._sums[items.start]

    def slowest(self, stages: Sequence[range]) -> float:
        """The largest load of a stage."""
        return max(map(self.load, stages))

    @cached_property
    def _sums(self) -> list[float]:
        """FLOPs of both passes of the items before each item."""
        return list(accumulate((item.both for item in self.items), initial=0.0))


def expected_work(config: RunConfig) -> tuple[ExpectedWork, ...]:
    """Work of a text step and of a multimodal step."""
    train, parallel, found = config.train, config.parallel, []
    for step in expected_steps(config):
        counts = step.counts(train.micro_batch, train.global_batch)
        if not parallel.encodes_ahead:
            found.append(ExpectedWork(step.name, step.share, item_passes(config, **counts)))
            continue
        stem, *_ = item_passes(config, **dict.fromkeys(counts, 0) | {"tiles": counts["tiles"]})
        towers = PassFlops(stem.forward / parallel.pipeline, stem.backward / parallel.pipeline)
        items = item_passes(config, **counts | {"tiles": 0})
        found.append(ExpectedWork(step.name, step.share, items, towers))
    return tuple(found)


def step_timeline(
    parallel: ParallelConfig, stages: Sequence[range], work: ExpectedWork, micro_batches: int
) -> Timeline:
    """The simulated passes of a step; the unit of time is a FLOP of one rank."""
    passes = [work.passes(items) for items in stages]
    return simulate(parallel, micro_batches, lambda each: getattr(passes[each.stage], each.kind))
