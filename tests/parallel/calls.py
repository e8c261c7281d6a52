"""Collectives that a rank calls, by their kind."""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch.distributed as dist

from megavl.parallel import collectives

_FUNCTIONS = {
    "all-gather": (collectives, "all_gather_single"),
    "reduce-scatter": (collectives, "reduce_scatter_single"),
    "all-reduce": (dist, "all_reduce"),
}


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """While entered, the collectives of `megavl.parallel.collectives` are counted, forward and backward."""
    calls: Counter[str] = Counter()

    def counting(kind: str, function):
        def call(*args, **kwargs):
            calls[kind] += 1
            return function(*args, **kwargs)

        return call

    with ExitStack() as patches:
        for kind, (module, name) in _FUNCTIONS.items():
            patches.enter_context(mock.patch.object(module, name, counting(kind, getattr(module, name))))
        yield calls
