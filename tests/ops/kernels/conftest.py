"""A process whose Triton kernels run in Triton's interpreter, on a CPU."""

import importlib.util
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any
from unittest import mock

import pytest

from tests.ops.kernels.interpreter import repair_interpreter

if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]

Interpreted = Callable[..., Any]


@pytest.fixture(scope="session")
def interpreted() -> Iterator[Interpreted]:
    """Call a function of a test module in that process. Triton chooses the interpreter when it is imported."""
    # Not a fork: the parent may have imported Triton already, and its threads may hold locks.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=repair_interpreter) as executor:

        def call(function: Callable, *args: Any, **kwargs: Any) -> Any:
            with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):  # the process starts with the first call
                return executor.submit(function, *args, **kwargs).result()

        yield call
