import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megavl.data.blend import merge

LENGTHS = st.lists(st.integers(1, 1000), min_size=20, max_size=30)
SOURCES = st.lists(st.tuples(st.floats(0.01, 10), LENGTHS), min_size=1, max_size=6)


def draw_by_draw(weights, lengths):
    """The rule, one draw after the other, until a source has nothing left."""
    drawn, taken = [0] * len(weights), [0] * len(weights)
    while True:
        source = min(range(len(weights)), key=lambda s: drawn[s] / weights[s])
        if taken[source] == len(lengths[source]):
            return
        yield source
        drawn[source] += lengths[source][taken[source]]
        taken[source] += 1


def sources_of(order, lengths):
    return np.repeat(np.arange(len(lengths)), list(map(len, lengths)))[order].tolist()


@settings(max_examples=40, deadline=None)
@given(SOURCES)
def test_the_sort_is_the_draws_one_by_one(sources):
    weights, lengths = zip(*sources, strict=True)
    order = merge(weights, [0] * len(weights), lengths)
    expected = list(draw_by_draw(weights, lengths))
    assert len(order) > 0 and sources_of(order, lengths) == expected[: len(order)]


@settings(max_examples=40, deadline=None)
@given(SOURCES)
def test_no_share_is_off_by_more_than_a_document(sources):
    """At every draw: never ahead by more than one document, never behind by more than the share of one of each."""
    weights, lengths = zip(*sources, strict=True)
    order = merge(weights, [0] * len(weights), lengths)
    chosen, tokens = sources_of(order, lengths), np.concatenate(lengths)[order]
    drawn, shares = np.zeros(len(weights)), np.array(weights) / sum(weights)
    longest = np.array([max(own) for own in lengths])
    for source, length in zip(chosen, tokens, strict=True):
        drawn[source] += length
        ahead = drawn - shares * drawn.sum()
        assert (ahead <= longest + 1e-6).all() and (ahead >= -shares * longest.sum() - 1e-6).all()


@settings(max_examples=40, deadline=None)
@given(SOURCES, st.lists(st.integers(1, 9), min_size=6, max_size=6))
def test_it_does_not_matter_how_many_documents_are_offered_at_a_time(sources, numbers):
    weights, lengths = zip(*sources, strict=True)
    whole = sources_of(merge(weights, [0] * len(weights), lengths), lengths)
    taken, drawn, found = [0] * len(weights), [0] * len(weights), []
    while all(first + number <= len(own) for first, number, own in zip(taken, numbers, lengths, strict=False)):
        offered = [own[first : first + number] for own, first, number in zip(lengths, taken, numbers, strict=False)]
        for source in sources_of(merge(weights, drawn, offered), offered):
            found.append(source)
            drawn[source] += lengths[source][taken[source]]
            taken[source] += 1
    assert found == whole[: len(found)] and found


@pytest.mark.parametrize(
    ("weights", "lengths", "expected"),
    [
        ((1, 1), ([10] * 4, [10] * 4), [0, 1] * 4),
        ((2, 1), ([10] * 4, [10] * 4), [0, 1, 0, 0, 1, 0]),
        ((1, 1), ([10] * 6, [30] * 3), [0, 1, 0, 0, 0, 1, 0, 0]),
    ],
)
def test_by_hand(weights, lengths, expected):
    found = sources_of(merge(weights, [0, 0], lengths), lengths)
    assert found == expected[: len(found)] and len(found) >= len(expected) - 1


def test_shares_of_tokens_whatever_the_lengths():
    """Short and long documents of equal weight give equal tokens, not equal documents."""
    lengths = ([100] * 1000, [10] * 10000)
    found = sources_of(merge((1.0, 1.0), [0, 0], lengths), lengths)
    counts = np.bincount(found)
    assert abs(counts[0] * 100 - counts[1] * 10) <= 100
