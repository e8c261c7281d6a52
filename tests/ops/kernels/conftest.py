"""The interpreter's process, one for the files of this folder."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.ops.kernels.interpreter import interpreter


@pytest.fixture(scope="package")
def interpreted() -> Iterator[Callable[..., Any]]:
    with interpreter() as call:
        yield call
