"""Fixtures for all rooms."""

import os

# Ranks share few cores: one thread each. DeepSpeed and the pool's children inherit both.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import pytest

from tests.pool import Pool

# Folders with the slowest files come first. Workers take a file at a time, and so they finish at about the same time.
_FIRST = ("runtime", "launch", "tools", "model", "plan", "checkpoint")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        folder = item.path.relative_to(item.config.rootpath / "tests").parts[0]
        return _FIRST.index(folder) if folder in _FIRST else len(_FIRST)

    items.sort(key=place)


@pytest.fixture(scope="session")
def pool() -> Pool:
    return Pool()
