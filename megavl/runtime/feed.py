"""Host-to-device copies of the micro-batches of a step."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megavl.batch import Batch


class Feed:
    """The micro-batches of one step on `device`.

    A step may have gigabytes of pixels, so the next micro-batch is copied while the current one is computed, on a
    stream of its own. Each stage has its own copies. Copies from pinned memory do not block the host.
    """

    def __init__(self, micro_batches: Sequence[Batch], device: torch.device):
        self._micro_batches, self._device = micro_batches, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def texts(self) -> Iterator[Batch]:
        """Each micro-batch in turn, without pixels: for stages that do not hold the stem."""
        return self._one_ahead([replace(batch, pixels=None) for batch in self._micro_batches])

    def batches(self) -> Iterator[Batch]:
        """Each micro-batch in turn, with its pixels: for the stage that holds the stem."""
        return self._one_ahead(self._micro_batches)

    def featured(self, features: Iterable[Tensor | None]) -> Iterator[Batch]:
        """Each micro-batch in turn, with its features: for the stage that holds the stem, where tiles are encoded
        before the passes."""
        for text, of_tiles in zip(self.texts(), features, strict=True):
            yield replace(text, features=of_tiles)

    def _one_ahead(self, micro_batches: Sequence[Batch]) -> Iterator[Batch]:
        ahead = self._copy(micro_batches[0])
        for following in micro_batches[1:]:
            batch, ahead = self._arrived(ahead), self._copy(following)
            yield batch
        yield self._arrived(ahead)

    def _copy(self, batch: Batch) -> Batch:
        """Start the copy."""
        with torch.cuda.stream(self._stream):  # None: the current stream
            return batch.to(self._device)

    def _arrived(self, batch: Batch) -> Batch:
        """Make the current stream wait for the copy, without blocking the host, and record that it reads the copy."""
        if self._stream is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            batch.record_stream(current)
        return batch
