"""Ranks that succeed together or fail together, by any exception."""

import torch.distributed as dist

from megavl.parallel.agree import RunError, on_every_rank, on_every_rank_with_notes, on_first_rank

BAD_INPUT = {"ValueError": ValueError, "OSError": OSError}
DEFECTS = {"KeyError": KeyError, "RuntimeError": RuntimeError, "MemoryError": MemoryError, "TypeError": TypeError}


class FileError(ValueError):
    """A type that a room asks for."""


def fail_on(ranks: set[int], kind: str = "ValueError", same: bool = False) -> int | str:
    """The result on this rank, or the message with which it ends, when some ranks fail."""

    def action() -> int:
        if dist.get_rank() in ranks:
            raise (BAD_INPUT | DEFECTS)[kind]("bad file" if same else f"bad file on {dist.get_rank()}")
        return dist.get_rank()

    try:
        return on_every_rank(action, dist.new_group())
    except RunError as error:
        return str(error)


def test_all_succeed(pool):
    assert pool.run(3, fail_on, set()) == [0, 1, 2]


def test_one_rank_fails_and_all_raise_its_message(pool):
    for kind in BAD_INPUT:
        assert pool.run(3, fail_on, {1}, kind) == ["bad file on 1"] * 3


def test_defects_end_all_ranks_too(pool):
    """Any other exception: its type is in the message, its traceback on the console of its rank."""
    for kind in DEFECTS:
        message = f"{kind}: {DEFECTS[kind]('bad file on 1')}"
        assert pool.run(2, fail_on, {1}, kind) == [message] * 2


def test_equal_failures_are_said_once(pool):
    assert pool.run(3, fail_on, {0, 2}, "ValueError", True) == ["bad file"] * 3


def test_different_failures_are_said_with_their_ranks(pool):
    assert pool.run(2, fail_on, {0, 1}) == ["rank 0: bad file on 0\nrank 1: bad file on 1"] * 2
    (message,) = set(pool.run(6, fail_on, set(range(6))))
    assert message.splitlines()[3:] == ["rank 3: bad file on 3", "... and 2 other failures"]


def first_rank_fails() -> tuple[str, list[int]]:
    ran = []

    def action() -> None:
        ran.append(dist.get_rank())
        raise FileError("disk is full")

    try:
        on_first_rank(action, dist.new_group(), FileError)
    except FileError as error:
        return str(error), ran


def test_what_only_the_first_rank_does_ends_all(pool):
    assert pool.run(2, first_rank_fails) == [("disk is full", [0]), ("disk is full", [])]


def note_on(ranks: set[int], failing: set[int] = frozenset()) -> tuple | str:
    def action() -> int:
        if dist.get_rank() in failing:
            raise ValueError(f"bad file on {dist.get_rank()}")
        return dist.get_rank()

    try:
        return on_every_rank_with_notes(
            action, lambda rank: f"seen by {rank}" if rank in ranks else None, dist.new_group()
        )
    except RunError as error:
        return str(error)


def test_notes_of_some_reach_all(pool):
    assert pool.run(3, note_on, {0, 2}) == [(rank, ["seen by 0", "seen by 2"]) for rank in range(3)]
    assert pool.run(2, note_on, set()) == [(0, []), (1, [])]


def test_a_failure_counts_more_than_a_note(pool):
    assert pool.run(2, note_on, {0}, {1}) == ["bad file on 1"] * 2


def test_without_process_groups(capsys):
    assert on_every_rank(lambda: 3, None) == 3
    try:
        on_every_rank(lambda: {}["lost"], None)
    except RunError as error:
        assert str(error) == "KeyError: 'lost'" and isinstance(error.__cause__, KeyError)
    assert 'lambda: {}["lost"]' in capsys.readouterr().err
