"""Bytes of the tensors that some work makes: what is left of them, and the most that there were."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Storages(TorchDispatchMode):
    """While entered, follows the storages that operations allocate. It goes on following them afterwards.

    bytes: of those that are in use
    peak:  the most that were
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._used: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, operation: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        out = operation(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            # A view, or what an operation writes in place, is of a storage that was there before.
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in given:
                self._follow(leaf.untyped_storage())
        return out

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._used:
            return

        def freed(_: weakref.ref) -> None:
            del self._used[key]
            self.bytes -= size

        self._used[key] = weakref.ref(storage, freed)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
