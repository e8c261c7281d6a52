"""Host-to-device copies of the micro-batches of a step."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megavl.batch import Batch


class Feed:
    """The micro-batches of one step on `device`.

    Tokens and borders of all micro-batches are copied first: a few megabytes. The pixels of a step would fill a device,
    so those of the next micro-batch are copied on a separate stream while the current one is computed. Copies from
    pinned memory do not block the host.
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
        for text, following in zip(self._texts, [*self._pixels[1:], {}], strict=True):
            pixels, ahead = self._arrived(ahead), self._copy(following)
            yield replace(text, pixels=pixels)

    def _copy(self, pixels: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Start the copies: tower -> float32 [tiles, 3, S, S] on the device."""
        with torch.cuda.stream(self._stream):  # None: the current stream
            return {tower: stack.to(self._device, non_blocking=True) for tower, stack in pixels.items()}

    def _arrived(self, pixels: dict[str, Tensor]) -> dict[str, Tensor]:
        """Make the current stream wait for the copies, without blocking the host, and record that it reads them."""
        if self._stream is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            for stack in pixels.values():
                stack.record_stream(current)
        return pixels
