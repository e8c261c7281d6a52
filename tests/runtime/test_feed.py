"""Copies to a GPU: on a stream of their own, while the micro-batch before is computed. Streams are stubs."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest import mock

import torch

from megavl.runtime.feed import Feed

COMPUTE, COPIES = "compute stream", "copy stream"


@dataclass
class Device:
    """Notes in order what is queued on its streams: (stream, what, ...)."""

    type: str = "cuda"
    current: str = COMPUTE
    queued: list[tuple] = field(default_factory=list)

    @contextmanager
    def stream(self, stream: "Stream") -> Iterator[None]:
        before, self.current = self.current, stream.name
        yield
        self.current = before


@dataclass
class Stream:
    device: Device
    name: str = COPIES

    def wait_stream(self, other: "Stream") -> None:
        self.device.queued.append((self.name, "waits for", other.name))


@dataclass(frozen=True)
class MicroBatch:
    """One in pinned memory, or its copy."""

    number: int
    copied: bool = False

    def to(self, device: Device) -> "MicroBatch":
        device.queued.append((device.current, "copies", self.number))
        return MicroBatch(self.number, copied=True)

    def record_stream(self, stream: Stream) -> None:
        stream.device.queued.append((stream.name, "keeps", self.number))


def queued(count: int) -> list[tuple]:
    """What a step of `count` micro-batches queues on the two streams."""
    device = Device()
    with (
        mock.patch.object(torch.cuda, "Stream", Stream),
        mock.patch.object(torch.cuda, "stream", device.stream),
        mock.patch.object(torch.cuda, "current_stream", lambda device: Stream(device, COMPUTE)),
    ):
        for number, batch in enumerate(Feed([MicroBatch(number) for number in range(count)], device).batches()):
            assert batch == MicroBatch(number, copied=True)
            device.queued.append((COMPUTE, "computes", number))
    return device.queued


def test_a_micro_batch_is_copied_while_the_one_before_is_computed():
    found = queued(3)
    assert [each for each in found if each[0] == COPIES] == [(COPIES, "copies", number) for number in range(3)]
    for number in range(3):
        computes, keeps = (found.index((COMPUTE, what, number)) for what in ("computes", "keeps"))
        assert found[keeps - 1] == (COMPUTE, "waits for", COPIES)
        # The wait covers the copies that are queued by then: this micro-batch's, and not the next one's.
        assert found.index((COPIES, "copies", number)) < keeps < computes
        if number < 2:
            assert keeps < found.index((COPIES, "copies", number + 1)) < computes
