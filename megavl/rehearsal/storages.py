"""Bytes of the storages that operations allocate: in use, and at the peak."""

import weakref
from collections.abc import Iterable
from functools import cache
from typing import Any

from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Storages(TorchDispatchMode):
    """While entered, follows the storages that operations allocate. It goes on following them afterwards.

    bytes: in use
    peak:  most that were in use
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._used: dict[int, weakref.ref] = {}

    def __torch_dispatch__(
        self, operation: OpOverload, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if not _may_allocate(operation):
            return operation(*args, **(kwargs or {}))
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        out = operation(*args, **(kwargs or {}))
        # A view, or what an operation writes in place, is of a storage that was there before.
        self.follow(
            leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in given
        )
        return out

    def follow(self, tensors: Iterable[Tensor]) -> None:
        """Follow the storages of some tensors from now on. Tensors of the device "meta" have no memory."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self._used and tensor.device.type != "meta":
                self._used[key] = weakref.ref(storage, lambda _, key=key, size=size: self._forget(key, size))
                self.changed(key, size)

    def _forget(self, key: int, size: int) -> None:
        del self._used[key]
        self.changed(key, -size)

    def changed(self, key: int, size: int) -> None:
        """`size` bytes were allocated, or freed where it is negative. A later storage may have the same key."""
        self.bytes += size
        self.peak = max(self.peak, self.bytes)


@cache
def _may_allocate(operation: OpOverload) -> bool:
    """Whether an operation returns more than views and arguments that it writes in place."""
    return any(returned.alias_info is None for returned in operation._schema.returns)
