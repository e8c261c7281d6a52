"""The corpus of the data tests, for the command lines that read or write one, and the modules beside the tools."""

from pathlib import Path

import pytest

from tests.data.conftest import corpus

__all__ = ["corpus"]


@pytest.fixture
def tools(monkeypatch):
    """`benchmarks` can be imported."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "tools")
