"""Automatic stage split: the contiguous partition of the model list that balances the work of the stages.

Ranks of a pipeline wait for the slowest stage, so a step takes about as long as that stage takes for all micro-batches.
A run takes text and multimodal steps, in which different stages may be slow, so the split minimises the mean over both.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import combinations
from math import inf
from operator import itemgetter
from typing import Any

from megavl.config.run import ParallelConfig, RunConfig
from megavl.config.stages import split_layers
from megavl.plan.expected_work import ExpectedWork, expected_work, step_timeline
from megavl.plan.hardware import usable_bytes
from megavl.plan.mix import expected_steps
from megavl.plan.peak import StepMemory, rank_peaks
from megavl.plan.schedule import stages_of


def split_model(config: RunConfig, world: int) -> tuple[range, ...]:
    """Items of the model list on each stage, in the order of the list, of a run that has passed the rules."""
    if config.parallel.stages == "auto":
        return _automatic(config, world)
    return split_layers(config.model.layers, config.parallel)


@lru_cache(maxsize=8)
def _automatic(config: RunConfig, world: int) -> tuple[range, ...]:
    parallel, work = config.parallel, [step for step in expected_work(config) if step.share > 0]
    # More micro-batches only lower the weight of the time in which the pipeline fills and empties.
    micro_batches = min(config.train.micro_batches(world // parallel.model), 4 * parallel.num_stages)

    def time(stages: tuple[range, ...]) -> float:
        return sum(step.share * step_timeline(parallel, stages, step, micro_batches).seconds for step in work)

    memories, limit = [], 0
    if parallel.device is not None:
        memories = [StepMemory(config, world, step) for step in expected_steps(config) if step.share > 0]
        limit = usable_bytes(parallel.device)

    def excess(stages: tuple[range, ...]) -> int:
        """Bytes that do not fit the devices, over all pipeline ranks."""
        return sum(max(0, peak.total - limit) for peak in rank_peaks(memories, stages)) if memories else 0

    even = least_slowest(work, parallel.num_stages)
    if parallel.pipeline == 1:
        return even
    starts = even, _with_even_ranks(even, work, parallel), equal_numbers(config.model.layers, parallel.num_stages)
    if memories:
        starts = tuple(_climb(start, _with_some_borders_moved, excess) for start in starts)

    def cost(stages: tuple[range, ...]) -> tuple[int, float]:
        return excess(stages), time(stages)

    best = min((_climb(start, _with_one_border_moved, cost) for start in dict.fromkeys(starts)), key=cost)
    # Where nothing fits, `megavl.plan.fit` says so, of the stages that balance the work.
    return min((_climb(start, _with_one_border_moved, time) for start in starts), key=time) if excess(best) else best


def least_slowest(work: Sequence[ExpectedWork], count: int) -> tuple[range, ...]:
    """The partition into `count` stages whose slowest stages, averaged over the kinds of steps, are least slow.

    Of two kinds, the load of the first is limited to each value that a stage can have, and that of the second minimised
    within the limit.
    """
    if len(work) == 1:
        return _partition(work[0], count)
    first, second = work
    loads = sorted({first.load(range(start, stop)) for start, stop in combinations(range(len(first.items) + 1), 2)})
    fastest = second.slowest(_partition(second, count))
    best, found = inf, ()
    for limit in loads:
        if first.share * limit + second.share * fastest >= best:
            break
        stages = _partition(second, count, lambda items, limit=limit: first.load(items) <= limit)
        if stages and (mean := first.share * first.slowest(stages) + second.share * second.slowest(stages)) < best:
            best, found = mean, stages
    return found


def _partition(
    work: ExpectedWork, count: int, admits: Callable[[range], bool] = lambda items: True
) -> tuple[range, ...]:
    """Contiguous, of `count` stages that are admitted; its slowest is least slow and, of equal ones, the loads are most
    even. Empty if there is none."""
    layers = len(work.items)
    # Of each number of leading items: the slowest load, the sum of the loads squared, the stages.
    best = {0: (0.0, 0.0, ())}
    for stage in range(1, count + 1):
        longer = {}
        for stop in range(stage, layers - (count - stage) + 1):
            for start in range(stage - 1, stop):
                items = range(start, stop)
                if start not in best or not admits(items):
                    continue
                load, (slowest, squares, before) = work.load(items), best[start]
                found = max(slowest, load), squares + load**2, (*before, items)
                if stop not in longer or found[:2] < longer[stop][:2]:
                    longer[stop] = found
        best = longer
    return best[layers][2] if layers in best else ()


def equal_numbers(layers: int, count: int) -> tuple[range, ...]:
    """Stages whose numbers of items differ by at most one."""
    borders = [layers * stage // count for stage in range(count + 1)]
    return tuple(map(range, borders, borders[1:]))


def _with_even_ranks(
    stages: tuple[range, ...], work: Sequence[ExpectedWork], parallel: ParallelConfig
) -> tuple[range, ...]:
    """Moves borders so that the slowest rank, which may have several stages, is less slow; of equal ones, the slowest
    stage."""
    held = [stages_of(rank, parallel) for rank in range(parallel.pipeline)]

    def slowness(stages: tuple[range, ...]) -> tuple[float, float]:
        of_ranks = (max(sum(step.load(stages[stage]) for stage in each) for each in held) for step in work)
        return (
            sum(step.share * slowest for step, slowest in zip(work, of_ranks, strict=True)),
            sum(step.share * step.slowest(stages) for step in work),
        )

    return _climb(stages, _with_some_borders_moved, slowness)


def _climb(
    stages: tuple[range, ...],
    neighbours: Callable[[tuple[range, ...]], Iterator[tuple[range, ...]]],
    cost: Callable[[tuple[range, ...]], Any],
) -> tuple[range, ...]:
    """Local search: moves to the neighbour of least cost for as long as the cost falls."""
    best = cost(stages)
    while True:
        found = min(((cost(each), each) for each in neighbours(stages)), default=(best, stages), key=itemgetter(0))
        if found[0] >= best:
            return stages
        best, stages = found


def _with_one_border_moved(stages: tuple[range, ...]) -> Iterator[tuple[range, ...]]:
    """Stages after a border between two of them has moved by an item."""
    return _moved(stages, ((border, border + 1) for border in range(len(stages) - 1)))


def _with_some_borders_moved(stages: tuple[range, ...]) -> Iterator[tuple[range, ...]]:
    """Stages after all borders between two of them have moved by an item: one has an item more, the other one less."""
    return _moved(stages, combinations(range(len(stages)), 2))


def _moved(stages: tuple[range, ...], runs: Iterable[tuple[int, int]]) -> Iterator[tuple[range, ...]]:
    """The stages with each run of borders, [first, last), moved by one item in either direction."""
    borders = [items.start for items in stages[1:]]
    for first, last in runs:
        for step in (-1, 1):
            moved = [border + step * (first <= index < last) for index, border in enumerate(borders)]
            found = tuple(map(range, (0, *moved), (*moved, stages[-1].stop)))
            if all(found):
                yield found
