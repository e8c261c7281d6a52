"""Fixtures for all rooms."""

import os

# Ranks share few cores: one thread each. DeepSpeed and the pool's children inherit both.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import pytest

from tests.pool import Pool


@pytest.fixture(scope="session")
def pool() -> Pool:
    return Pool()
