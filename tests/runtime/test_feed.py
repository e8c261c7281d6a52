"""Copies of pixels to a GPU: on a stream of their own, while the micro-batch before is computed. Streams are stubs."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from unittest import mock

import torch

from megavl.batch import Batch
from megavl.runtime.feed import Feed
from tests.model import tiny
from tests.runtime.test_kernels import ALIGNED

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


class Pixels:
    """Of the micro-batch `number`, in pinned memory."""

    def __init__(self, number: int, home: str = "host"):
        self.number, self.home = number, home

    def to(self, device: Device, non_blocking: bool) -> "Pixels":
        device.queued.append((device.current, "copies" if non_blocking else "blocks for", self.number))
        return Pixels(self.number, "device")

    def record_stream(self, stream: Stream) -> None:
        stream.device.queued.append((stream.name, "keeps", self.number))


def queued(count: int) -> list[tuple]:
    """What a step of `count` micro-batches queues on the two streams."""
    config, device = ALIGNED["vl"], Device()
    text = tiny.pack([tiny.document(config, (5,), seed=0)], tiny.pixels(config, images=0, seed=0), config)
    with (
        mock.patch.object(torch.cuda, "Stream", Stream),
        mock.patch.object(torch.cuda, "stream", device.stream),
        mock.patch.object(torch.cuda, "current_stream", lambda device: Stream(device, COMPUTE)),
        mock.patch.object(Batch, "to", lambda batch, device: batch),
    ):
        batches = [replace(text, pixels=Pixels(number)) for number in range(count)]
        for number, batch in enumerate(Feed(batches, device).batches()):
            assert (batch.pixels.number, batch.pixels.home) == (number, "device")
            device.queued.append((COMPUTE, "computes", number))
    return device.queued


def test_pixels_are_copied_while_the_micro_batch_before_is_computed():
    found = queued(3)
    assert [each for each in found if each[0] == COPIES] == [(COPIES, "copies", number) for number in range(3)]
    for number in range(3):
        computes, waits = (found.index((COMPUTE, what, number)) for what in ("computes", "keeps"))
        assert found[waits - 1] == (COMPUTE, "waits for", COPIES)
        # The wait covers the copies that are queued by then: this micro-batch's, and not the next one's.
        assert found.index((COPIES, "copies", number)) < waits < computes
        if number < 2:
            assert waits < found.index((COPIES, "copies", number + 1)) < computes
