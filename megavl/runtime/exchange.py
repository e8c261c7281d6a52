"""Inputs of this rank's passes during one step, from its own passes or from other pipeline ranks."""

import torch
import torch.distributed as dist
from torch import Tensor

from megavl.parallel.groups import Axis
from megavl.plan.schedule import Pass, Transfer


class Exchange:
    """Hidden states and their gradients, keyed by the pass that reads them."""

    def __init__(self, pp: Axis, shape: tuple[int, int], dtype: torch.dtype, device: torch.device):
        """No message yet.

        Args:
            pp: the pipeline axis
            shape, dtype, device: of every message
        """
        self._pp, self._shape, self._dtype, self._device = pp, shape, dtype, device
        self._inputs: dict[Pass, Tensor] = {}
        self._arriving: dict[Pass, dist.Work] = {}
        self._sending: list[tuple[Tensor, dist.Work]] = []

    def put(self, consumer: Pass, output: Tensor) -> None:
        """Store the output of a pass for `consumer`, which may be on another rank."""
        self._inputs[consumer] = output

    def post(self, transfers: tuple[Transfer, ...]) -> None:
        """Start transfers as one batch, without blocking the host or the current stream."""
        self._release()
        tensors = [self._sent(each) if each.source == self._pp.rank else self._buffer() for each in transfers]
        works = dist.batch_isend_irecv(
            [self._operation(each, tensor) for each, tensor in zip(transfers, tensors, strict=True)]
        )
        if len(works) == 1:  # NCCL has one for the whole batch
            works = works * len(transfers)
        for each, tensor, work in zip(transfers, tensors, works, strict=True):
            if each.source == self._pp.rank:
                self._sending.append((tensor, work))
            else:
                self._inputs[each.consumer], self._arriving[each.consumer] = tensor, work

    def take(self, consumer: Pass) -> Tensor | None:
        """Remove and return the input of a pass, once it has arrived; None for a pass without one."""
        if consumer in self._arriving:
            self._arriving.pop(consumer).wait()
        return self._inputs.pop(consumer, None)

    def finish(self) -> None:
        """Wait for the last messages to leave."""
        for _, work in self._sending:
            work.wait()
        self._sending.clear()

    def _buffer(self) -> Tensor:
        return torch.empty(self._shape, dtype=self._dtype, device=self._device)

    def _sent(self, transfer: Transfer) -> Tensor:
        return self._inputs.pop(transfer.consumer).contiguous()

    def _operation(self, transfer: Transfer, tensor: Tensor) -> dist.P2POp:
        if transfer.source == self._pp.rank:
            return dist.P2POp(dist.isend, tensor, group=self._pp.group, group_peer=transfer.target)
        return dist.P2POp(dist.irecv, tensor, group=self._pp.group, group_peer=transfer.source)

    def _release(self) -> None:
        """Free the messages that have left; `wait` raises their errors.

        gloo knows of completion only after `wait`, so that with it all messages stay until `finish`.
        """
        waiting = []
        for tensor, work in self._sending:
            if work.is_completed():
                work.wait()
            else:
                waiting.append((tensor, work))
        self._sending = waiting
