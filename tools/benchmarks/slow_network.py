"""Messages between processes of one machine as over a network of a given latency and bandwidth.

gloo's own transfer takes place, and the message arrives no sooner than it would over the network. Messages of a process
follow each other, as over one network adapter. A process that waits for a message sleeps, which leaves its core free.
"""

import inspect
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from megavl.parallel import collectives
from megavl.runtime.deepspeed import zero1

# Bytes that a rank sends over those of the largest tensor, for n ranks: those of a ring.
_SENT = {
    "all_reduce": lambda n: 2 * (n - 1) / n,
    "all_gather_single": lambda n: (n - 1) / n,
    "reduce_scatter_single": lambda n: (n - 1) / n,
    "all_to_all_single": lambda n: (n - 1) / n,
}
_PLACES = (
    (dist, "all_reduce"),
    (dist, "all_to_all_single"),
    (collectives, "all_gather_single"),
    (collectives, "reduce_scatter_single"),
    (zero1, "all_gather_single"),
    (zero1, "reduce_scatter_single"),
)


@dataclass
class Message:
    """One collective.

    takes_s:  on the network, if no other message is before it
    started, arrived: readings of `time.perf_counter`
    waited_s: how long the process waited for the network; not for other ranks that were late
    """

    name: str
    asynchronous: bool
    takes_s: float
    started: float
    arrived: float
    waited_s: float = 0.0


class _Work:
    """Handle of a message that is under way."""

    def __init__(self, work: dist.Work, message: Message):
        self._work, self._message, self._done = work, message, False

    def wait(self) -> None:
        self.wait_since(time.perf_counter())

    def wait_since(self, began: float) -> None:
        """Wait; `began` is the time from which on the process has nothing else to do."""
        if self._done:
            return
        self._done = True
        self._message.waited_s = max(0.0, self._message.arrived - began)
        self._work.wait()
        time.sleep(max(0.0, self._message.arrived - time.perf_counter()))


class SlowNetwork(AbstractContextManager):
    """While entered, delays the collectives over several ranks; the pipeline's messages are not delayed.

    Attributes:
        overlaps: whether a message that is started asynchronously leaves the process free; if not, it waits at once
        messages: in the order of their starts
    """

    def __init__(self, latency_s: float, bytes_per_s: float):
        self._latency_s, self._bytes_per_s = latency_s, bytes_per_s
        self.overlaps, self.messages = True, list[Message]()
        self._free = 0.0  # when the last message has arrived
        self._stack = ExitStack()

    def __enter__(self) -> "SlowNetwork":
        for module, name in _PLACES:
            self._stack.enter_context(mock.patch.object(module, name, self._delayed(name, getattr(module, name))))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def _delayed(self, name: str, collective: Callable) -> Callable:
        signature = inspect.signature(collective)

        def call(*args, **kwargs) -> _Work | None:
            given = signature.bind(*args, **kwargs).arguments
            ranks = dist.get_world_size(given.get("group"))
            if ranks == 1:
                return collective(*args, **kwargs)
            asynchronous = given.get("async_op", False)
            size = max(each.nbytes for each in given.values() if isinstance(each, torch.Tensor))
            takes_s = self._latency_s + size * _SENT[name](ranks) / self._bytes_per_s
            started = time.perf_counter()
            self._free = max(self._free, started) + takes_s
            message = Message(name, asynchronous, takes_s, started, self._free)
            self.messages.append(message)
            work = _Work(collective(*args, **kwargs | {"async_op": True}), message)
            if not (asynchronous and self.overlaps):
                work.wait_since(started)
            return work if asynchronous else None

        return call
