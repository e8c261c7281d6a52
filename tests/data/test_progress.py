"""Progress on a terminal and elsewhere."""

import io
import sys

import pytest

from megavl.data import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets, in seconds."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_without_a_terminal_a_line_every_ten_seconds(clock, capsys):
    with progress.ProgressBar("reading", 10_000_000, "bytes") as bar:
        for _ in range(25):
            clock[0] += 1
            bar.advance(100_000, "7 images")
    assert capsys.readouterr().err.splitlines() == [
        "reading: 10%, 100.0 kB/s, 0:01:30 left, 7 images",
        "reading: 20%, 100.0 kB/s, 0:01:20 left, 7 images",
    ]


def test_counted_things_have_no_prefix(clock, capsys):
    with progress.ProgressBar("reading", 50_000, "documents") as bar:
        clock[0] += 10
        bar.advance(12_340)
    assert capsys.readouterr().err == "reading: 25%, 1,234 documents/s, 0:00:31 left\n"


def test_a_terminal_gets_a_bar(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "120")
    with progress.ProgressBar("read[ing", 4, "documents") as bar:
        bar.advance(3)
        bar.advance(1, "[b]7 images")
    assert "read[ing" in terminal.getvalue() and "100%" in terminal.getvalue()
    assert "documents/s" in terminal.getvalue() and "[b]7 images" in terminal.getvalue()


@pytest.mark.parametrize(
    ("size_bytes", "shown"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (12_340_000, "12.3 MB"), (5e15, "5,000.0 TB")],
)
def test_sizes(size_bytes, shown):
    assert progress.size(size_bytes) == shown
