"""Launches of Triton kernels, which a dispatch mode does not see. They are noted, and nothing is computed."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

from torch import Tensor
from triton.runtime.jit import JITFunction


@contextmanager
def noted_launches(note: Callable[[Sequence[Tensor]], None]) -> Iterator[None]:
    """While entered, each launch calls `note` with the tensors that the kernel is handed, each once, and runs nothing.

    A pointer that a variant of a kernel does not use is given a tensor that the kernel is handed anyway.
    """

    def run(kernel: JITFunction, *args, grid: object, warmup: bool, **constants) -> None:
        note(list({id(value): value for value in args if isinstance(value, Tensor)}.values()))

    with mock.patch.object(JITFunction, "run", run):
        yield
