"""Fixtures of whole runs: the corpus of the data tests, and ranks whose Triton kernels are interpreted."""

import pickle
from collections.abc import Callable

import pytest

from tests.data.conftest import corpus
from tests.ops.kernels.conftest import Interpreted, interpreted
from tests.pool import Pool

__all__ = ["corpus", "interpreted"]


@pytest.fixture(scope="session")
def interpreted_run(interpreted: Interpreted) -> Callable[..., list]:
    """`Pool.run` with ranks that interpret Triton kernels. Triton decides that when it is imported, which a pool's fork
    server does: these ranks have another one, a child of the interpreting process."""
    return lambda world, function, *args: pickle.loads(interpreted(_run, world, function, *args))


def _run(world: int, function: Callable, *args) -> bytes:
    # By value, as the ranks send their results.
    return pickle.dumps(Pool().run(world, function, *args))
