"""Shared memory for the pixels of micro-batches, used again and again.

A worker process that asked for fresh memory each time would spend a tenth of its time on it: the system fills in its
pages one by one (measured for the square of the 7B: 1.3 ms, and 0.2 ms in used memory, where decoding and resizing take
13).

The memory belongs to the worker process and is known by the number of its place. The training process numbers the
places: it gives one with each request, and gives it again when no tensor there shows it any more.
"""

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from megavl.config.model import ModelConfig
from megavl.data import image


class Places:
    """In the training process: which places are free.

    Requests go to the worker processes in turn, and so do the places: worker w of n has w, w + n, w + 2 n, ...
    (Were one to get another's, it would give it memory of its own, and nothing else would change.)
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._requests = 0
        self._shown_by: dict[int, StorageWeakRef | None] = {}

    def take(self) -> int:
        """A free place for the next request."""
        place = self._requests % self._workers
        self._requests += 1
        while not self._free(place):
            place += self._workers
        self._shown_by[place] = None
        return place

    def give_back(self, place: int, pixels: Tensor | None) -> None:
        """A place comes back: with the pixels in it, which show it for as long as they live, or with none."""
        if pixels is None:
            del self._shown_by[place]
        else:
            self._shown_by[place] = StorageWeakRef(pixels.untyped_storage())

    def _free(self, place: int) -> bool:
        """None in the table: requested, and not there yet."""
        if place not in self._shown_by:
            return True
        shown_by = self._shown_by[place]
        return shown_by is not None and shown_by.expired()


class PlaceMemory:
    """In a worker process: the memory of its places. It grows with the number of tiles in a place."""

    def __init__(self, model: ModelConfig) -> None:
        self._model = model
        self._memory: dict[int, Tensor] = {}

    def room(self, place: int, tiles: int) -> Tensor:
        """Room for the pixels of some tiles in a place: uint8 [tiles, 3, S, S]."""
        if place not in self._memory or len(self._memory[place]) < tiles:
            self._memory[place] = image.empty_pixels(self._model, tiles).share_memory_()
        return self._memory[place][:tiles]
