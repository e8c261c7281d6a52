"""Inputs of this rank's passes during one step, from its own passes or from other pipeline ranks."""

from collections import deque

import torch
import torch.distributed as dist
from torch import Tensor

from megavl.parallel.groups import Axis
from megavl.plan.schedule import Pass, Transfer

# Batches of transfers whose sends may be pending. Fewer would cost time, more would save none
# (tests/plan/test_schedule.py).
BATCHES_PENDING = 2


class Exchange:
    """Hidden states and their gradients, keyed by the pass that reads them.

    A batch waits for the sends of the one that is `BATCHES_PENDING` batches older, so that the memory of messages does
    not grow with the number of micro-batches. No deadlock follows: the programs can be performed even if every rank
    waits for each batch as soon as it is posted.
    """

    def __init__(self, pp: Axis, shape: tuple[int, int], dtype: torch.dtype, device: torch.device):
        """No message yet.

        Args:
            pp: the pipeline axis
            shape, dtype, device: of every message
        """
        self._pp, self._shape, self._dtype, self._device = pp, shape, dtype, device
        self._inputs: dict[Pass, Tensor] = {}
        self._arriving: dict[Pass, dist.Work] = {}
        self._pending: deque[list[tuple[Tensor, dist.Work]]] = deque()

    def put(self, consumer: Pass, output: Tensor) -> None:
        """Store the output of a pass for `consumer`, which may be on another rank."""
        self._inputs[consumer] = output

    def post(self, transfers: tuple[Transfer, ...]) -> None:
        """Start transfers as one batch, and complete the sends of an older one.

        With NCCL the current stream waits for these, with gloo the host.
        """
        tensors = [self._sent(each) if each.source == self._pp.rank else self._buffer() for each in transfers]
        works = dist.batch_isend_irecv(
            [self._operation(each, tensor) for each, tensor in zip(transfers, tensors, strict=True)]
        )
        if len(works) == 1:  # NCCL has one for the whole batch
            works = works * len(transfers)
        sends = []
        for each, tensor, work in zip(transfers, tensors, works, strict=True):
            if each.source == self._pp.rank:
                sends.append((tensor, work))
            else:
                self._inputs[each.consumer], self._arriving[each.consumer] = tensor, work
        self._pending.append(sends)
        self._complete(BATCHES_PENDING)

    def take(self, consumer: Pass) -> Tensor | None:
        """Remove and return the input of a pass, once it has arrived; None for a pass without one."""
        if consumer in self._arriving:
            self._arriving.pop(consumer).wait()
        return self._inputs.pop(consumer, None)

    def finish(self) -> None:
        """Wait for the last messages to leave."""
        self._complete(0)

    def _buffer(self) -> Tensor:
        return torch.empty(self._shape, dtype=self._dtype, device=self._device)

    def _sent(self, transfer: Transfer) -> Tensor:
        return self._inputs.pop(transfer.consumer).contiguous()

    def _operation(self, transfer: Transfer, tensor: Tensor) -> dist.P2POp:
        if transfer.source == self._pp.rank:
            return dist.P2POp(dist.isend, tensor, group=self._pp.group, group_peer=transfer.target)
        return dist.P2POp(dist.irecv, tensor, group=self._pp.group, group_peer=transfer.source)

    def _complete(self, pending: int) -> None:
        """Free the messages of all but the last `pending` batches; `wait` raises their errors."""
        while len(self._pending) > pending:
            for _, work in self._pending.popleft():
                work.wait()
