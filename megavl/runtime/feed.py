"""Host-to-device copies of the micro-batches of a step."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megavl.batch import Batch


class Feed:
    """The micro-batches of one step on `device`.

    Tokens and borders of all micro-batches are copied first: a few megabytes. The pixels of a step may be gigabytes, so
    those of the next micro-batch are copied on a separate stream while the current one is computed. Copies from pinned
    memory do not block the host.
    """

    def __init__(self, micro_batches: Sequence[Batch], device: torch.device):
        self._device = device
        self._pixels = [batch.pixels for batch in micro_batches]
        self._texts = [replace(batch, pixels=None).to(device) for batch in micro_batches]
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def texts(self) -> Iterator[Batch]:
        """Each micro-batch in turn, without pixels: for stages that do not hold the stem."""
        yield from self._texts

    def batches(self) -> Iterator[Batch]:
        """Each micro-batch in turn, with its pixels: for the stage that holds the stem."""
        ahead = self._copy(self._pixels[0])
        for text, following in zip(self._texts, [*self._pixels[1:], None], strict=True):
            pixels, ahead = self._arrived(ahead), self._copy(following)
            yield replace(text, pixels=pixels)

    def _copy(self, pixels: Tensor | None) -> Tensor | None:
        """Start the copy; None after the last micro-batch."""
        if pixels is None:
            return None
        with torch.cuda.stream(self._stream):  # None: the current stream
            return pixels.to(self._device, non_blocking=True)

    def _arrived(self, pixels: Tensor) -> Tensor:
        """Make the current stream wait for the copy, without blocking the host, and record that it reads the pixels."""
        if self._stream is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            pixels.record_stream(current)
        return pixels
