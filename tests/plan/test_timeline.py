"""Timeline of a step: the formulas of the bubble, the test's own makespan, and steps that are done by hand."""

import random
from itertools import pairwise

import pytest

from megavl.config.run import ParallelConfig
from megavl.plan.schedule import Pass, consumer_of, programs
from megavl.plan.timeline import Timeline, equal_stages_bubble, simulate
from tests.plan.test_schedule import SIZES, dualpipev, makespan, name_of, parallel_of, twice_as_long_backward


def actions(timeline: Timeline, rank: int) -> list[tuple[str, int, int, float, float]]:
    spans = timeline.spans[rank]
    return [(each.action.kind, each.action.stage, each.action.micro_batch, each.start, each.end) for each in spans]


@pytest.mark.parametrize(("pipeline", "virtual"), SIZES)
def test_the_bubble_is_that_of_the_formula(pipeline, virtual):
    micro_batches = 4 * pipeline
    timeline = simulate(parallel_of(pipeline, virtual), micro_batches, twice_as_long_backward(1 / virtual))
    idle = (pipeline - 1) / virtual
    assert timeline.seconds == pytest.approx(3 * (micro_batches + idle))
    assert timeline.busy == pytest.approx([3 * micro_batches] * pipeline)
    assert timeline.bubble == pytest.approx(idle / (micro_batches + idle))
    assert equal_stages_bubble(parallel_of(pipeline, virtual), micro_batches) == pytest.approx(timeline.bubble)


@pytest.mark.parametrize("message", [0.0, 0.3])
@pytest.mark.parametrize(
    "parallel", [*(parallel_of(*size) for size in ((2, 1), (4, 1), (3, 2), (4, 3))), dualpipev(3)], ids=name_of
)
def test_uneven_passes_take_the_time_that_their_dependencies_need(parallel, message):
    """Against the recursion of the test, with a time for every stage and micro-batch; inputs are there before passes
    begin, and a rank runs one pass at a time."""
    for micro_batches in (1, 3, 8):
        draw = random.Random(micro_batches)
        seconds = {
            each: draw.uniform(0.1, 3) for of_rank in programs(parallel, micro_batches) for each in passes(of_rank)
        }
        timeline = simulate(parallel, micro_batches, seconds.__getitem__, message=message)
        assert timeline.seconds == pytest.approx(makespan(programs(parallel, micro_batches), seconds.get, message))
        spans = {each.action: each for of_rank in timeline.spans for each in of_rank}
        assert spans.keys() == seconds.keys()
        for action, span in spans.items():
            assert span.end - span.start == pytest.approx(seconds[action])
            consumer = consumer_of(action, parallel.num_stages)
            assert consumer is None or span.end <= spans[consumer].start
        for of_rank in timeline.spans:
            assert all(first.end <= second.start for first, second in pairwise(of_rank))


def passes(program):
    return [each for each in program if isinstance(each, Pass)]


def test_a_step_by_hand():
    """Two micro-batches over two stages. The second stage takes twice as long as the first."""
    cost = {("forward", 0): 1, ("backward", 0): 2, ("forward", 1): 2, ("backward", 1): 4}
    timeline = simulate(parallel_of(2, 1), 2, lambda each: cost[each.kind, each.stage])
    assert actions(timeline, 0) == [
        ("forward", 0, 0, 0, 1),
        ("forward", 0, 1, 1, 2),
        ("backward", 0, 0, 7, 9),
        ("backward", 0, 1, 13, 15),
    ]
    assert actions(timeline, 1) == [
        ("forward", 1, 0, 1, 3),
        ("backward", 1, 0, 3, 7),
        ("forward", 1, 1, 7, 9),
        ("backward", 1, 1, 9, 13),
    ]
    assert timeline.seconds == 15 and timeline.busy == (6, 12) and timeline.bubble == pytest.approx(1 - 18 / 30)
    assert timeline.bubble_beside(5) == pytest.approx(1 - 28 / 40)


def test_messages_on_the_way():
    """One micro-batch over four stages: three messages there and three back."""
    timeline = simulate(parallel_of(4, 1), 1, twice_as_long_backward(1), message=0.5)
    assert timeline.seconds == pytest.approx(4 * 3 + 6 * 0.5)


def test_forward_passes_alone():
    timeline = simulate(parallel_of(4, 1), 8, twice_as_long_backward(1), backward=False)
    assert timeline.seconds == 8 + 3 and {each.action.kind for each in timeline.spans[0]} == {"forward"}


def test_passes_without_duration_leave_no_bubble():
    timeline = simulate(ParallelConfig(pipeline=2), 3, lambda _: 0.0)
    assert timeline.seconds == timeline.bubble == 0
