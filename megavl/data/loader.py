"""Loader: the steps of one rank, read, decoded and assembled ahead of the training process."""

import math
import time
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise

from torch.utils.data import DataLoader, Dataset

from megavl.batch import Kind, StepBatch, TilesAhead
from megavl.config.data_rules import loader_problems
from megavl.config.model import ModelConfig
from megavl.data import image
from megavl.data.assemble import Assembled, Assembler, Decoded, ImageShare
from megavl.data.errors import DataError
from megavl.data.pack import Pack
from megavl.data.places import PlaceMemory, Places
from megavl.data.sampler import Sampler, StepPlan
from megavl.data.worker import end_with_parent

# Seconds between two looks at worker processes that bring nothing.
_LOOK_S = 1.0
# Documents of a dataset that a message names; more would hide the rest of it.
_NAMED = 3


# Tiles in the packs of each data-parallel rank -> those that this rank encodes, in their order over the global batch.
StepShare = Callable[[Sequence[int]], range]
_Arrived = Assembled | Decoded | DataError


@dataclass(frozen=True)
class _Request:
    """A micro-batch to assemble, or some tiles to decode.

    first: number of the first pack in the global batch of the step
    tiles: those to decode, counted from the first one of the packs; None for a micro-batch
    """

    step: int
    kind: Kind
    first: int
    packs: tuple[Pack, ...]
    tiles: range | None
    place: int | None


@dataclass(frozen=True)
class _Planned:
    """A step that was asked for.

    by_replica: tiles in the packs of each data-parallel rank
    pieces:     requests for tiles without their micro-batches
    """

    plan: StepPlan
    by_replica: tuple[int, ...]
    pieces: int


class Loader:
    """Iterates over the step batches of one data-parallel rank, from `first_step` to the end of the run.

    Packs of a global batch are numbered; rank r of dp_size takes the r-th of dp_size equal runs of them, cut into
    micro-batches of `train.micro_batch`. The training process plans, which needs lengths only; worker processes read.
    """

    def __init__(
        self,
        sampler: Sampler,
        dp_rank: int,
        dp_size: int,
        images: ImageShare | None,
        first_step: int,
        pin_memory: bool = False,
        ahead: StepShare | None = None,
    ) -> None:
        """Worker processes start with the iteration.

        Args:
            images: which to decode of each micro-batch; None on ranks that do not hold the stem, and with `ahead`.
                Ranks that decode nothing need no worker process.
            ahead: which tiles of a step to decode, of whatever packs; None where micro-batches have theirs.
            pin_memory: bring batches in page-locked memory, for a GPU.

        Raises:
            DataError: the global batch is not divisible into micro-batches of every rank.
        """
        train, data = sampler.train, sampler.data
        if problems := loader_problems(train, dp_size):
            raise DataError("\n".join(problems))
        self._sampler, self._first_step, self._pin_memory = sampler, first_step, pin_memory
        share = train.global_batch // dp_size
        self._firsts = range(dp_rank * share, (dp_rank + 1) * share, train.micro_batch)
        self._share, self._ahead = share, ahead
        decodes = images is not None or ahead is not None
        self._workers = data.workers if decodes else 0
        # Each worker process decodes an equal part of a step's tiles.
        self._most_pieces = 0 if ahead is None else max(1, data.workers)
        self._places = Places(self._workers) if self._workers else None
        assembler = Assembler(sampler.stores, sampler.model, data.seq_len, sampler.eos, images)
        self._assembly = _Assembly(assembler, sampler.model)
        self._requests: deque[_Request] = deque()
        self._arriving: Iterator[_Arrived] = iter(())

    def __iter__(self) -> Iterator[StepBatch]:
        """The steps in order. Images that could not be decoded are in their `bad_images`: whoever asks for a step
        decides how many are too many.

        Raises:
            DataError: a document of a step cannot be read; a worker process has died or brings nothing for
                `data.timeout_s`. The message names the documents.
        """
        planned: deque[_Planned] = deque()
        self._arriving = iter(self._start(planned))
        for step in range(self._first_step, self._sampler.train.steps):
            arrived = [self._next() for _ in self._firsts]
            current = planned.popleft()
            decoded, plan = [self._next() for _ in range(current.pieces)], current.plan
            ahead = None
            if self._ahead is not None:
                ahead = TilesAhead(current.by_replica, tuple(one.pixels for one in decoded))
            yield StepBatch(
                step=step,
                kind=plan.kind,
                micro_batches=tuple(one.batch for one in arrived),
                supervised_tokens=plan.supervised_tokens,
                tokens=plan.tokens,
                images=plan.images,
                tiles=plan.tiles,
                squared_tokens=plan.squared_tokens,
                bad_images=tuple(bad for one in (*arrived, *decoded) for bad in one.bad_images),
                ahead=ahead,
            )

    def close(self) -> None:
        """End the worker processes."""
        self._arriving = iter(())

    def _start(self, planned: deque[_Planned]) -> DataLoader:
        workers, requests = self._workers, len(self._firsts) + self._most_pieces
        return DataLoader(
            self._assembly,
            sampler=self._plan(planned),
            batch_size=None,
            num_workers=workers,
            prefetch_factor=math.ceil(self._sampler.data.prefetch * requests / workers) if workers else None,
            collate_fn=_same,
            pin_memory=self._pin_memory,
            timeout=_LOOK_S if workers else 0,
            worker_init_fn=_start_worker,
            # A fork of the training process would inherit its communication threads and its accelerator.
            multiprocessing_context="forkserver" if workers else None,
        )

    def _plan(self, planned: deque[_Planned]) -> Iterator[_Request]:
        """What to assemble, micro-batch after micro-batch, and then what to decode alone; the DataLoader asks ahead of
        what it returns."""
        for step in range(self._first_step, self._sampler.train.steps):
            plan = self._sampler.plan(step)
            # Tiles before each pack.
            borders = [0, *accumulate(sum(piece.tiles for piece in pack) for pack in plan.packs)]
            by_replica = tuple(stop - start for start, stop in pairwise(borders[:: self._share]))
            pieces = self._pieces(by_replica)
            planned.append(_Planned(plan, by_replica, len(pieces)))
            for first in self._firsts:
                yield self._request(step, plan, first, first + self._firsts.step, None)
            for run in pieces:
                first, stop = bisect_right(borders, run.start) - 1, bisect_left(borders, run.stop)
                within = range(run.start - borders[first], run.stop - borders[first])
                yield self._request(step, plan, first, stop, within)

    def _pieces(self, by_replica: Sequence[int]) -> list[range]:
        """The tiles that this rank decodes ahead, cut into as many runs as there are worker processes; the numbers of
        tiles differ by one at most, and none is empty."""
        if self._ahead is None:
            return []
        mine = self._ahead(by_replica)
        count = min(self._most_pieces, len(mine))
        borders = [mine.start + index * len(mine) // count for index in range(count + 1)] if count else []
        return [range(start, stop) for start, stop in pairwise(borders)]

    def _request(self, step: int, plan: StepPlan, first: int, stop: int, tiles: range | None) -> _Request:
        place = self._places.take() if self._places is not None else None
        self._requests.append(_Request(step, plan.kind, first, plan.packs[first:stop], tiles, place))
        return self._requests[-1]

    def _next(self) -> Assembled | Decoded:
        """What was asked for next, when it is there. Worker processes bring it in the order of the requests."""
        arrived = self._wait()
        request = self._requests.popleft()
        if isinstance(arrived, DataError):
            raise arrived
        if self._places is not None:
            pixels = arrived.pixels
            # The place is free at once if the pixels were copied to pinned memory, or if there are none.
            in_place = pixels is not None and len(pixels) and not self._pin_memory
            self._places.give_back(request.place, pixels if in_place else None)
        return arrived

    def _wait(self) -> _Arrived:
        timeout_s = self._sampler.data.timeout_s
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                return next(self._arriving)
            except RuntimeError as error:
                # The DataLoader's own, of which it has no classes; after a time-out it can be asked again.
                if "exited unexpectedly" in str(error):
                    raise DataError(
                        f"a loader process of this rank was killed ({error}); {self._awaited()}. The system ends "
                        "processes when memory runs out (see its log), and one that finds no room in /dev/shm ends "
                        "with a bus error (a container's is 64 MiB unless it is told otherwise); give more, or lower "
                        "data.workers or data.prefetch"
                    ) from error
                if "timed out" not in str(error):
                    raise
                if time.monotonic() > deadline:
                    raise DataError(
                        f"no micro-batch from the loader processes of this rank for {timeout_s:g} s; "
                        f"{self._awaited()}. A disk hangs or is slow, or a document takes that long; raise "
                        "data.timeout_s if that is to be expected"
                    ) from error

    def _awaited(self) -> str:
        """What the micro-batch that should be here is made of."""
        request = self._requests[0]
        documents: dict[str, list[str]] = {}
        for piece in (piece for pack in request.packs for piece in pack):
            store = self._sampler.stores[request.kind][piece.source]
            documents.setdefault(store.prefix, []).append(f"{store.key(piece.document)} (number {piece.document})")
        named = (
            f"{prefix}: {', '.join(keys[:_NAMED])}{f' and {len(keys) - _NAMED} more' * (len(keys) > _NAMED)}"
            for prefix, keys in documents.items()
        )
        return f"due is step {request.step + 1}, with these documents of {'; of '.join(named)}"


class _Assembly(Dataset):
    """The DataLoader's data set, which lives in the worker processes; its indices are the requests themselves."""

    def __init__(self, assembler: Assembler, model: ModelConfig) -> None:
        self._assembler, self._model = assembler, model
        self._memory = PlaceMemory(model)

    def __getitem__(self, request: _Request) -> _Arrived:
        in_place = request.place is not None
        room = partial(self._memory.room, request.place) if in_place else partial(image.empty_pixels, self._model)
        try:
            if request.tiles is None:
                return self._assembler(request.kind, request.first, request.packs, room)
            return self._assembler.decode(request.kind, request.first, request.packs, request.tiles, room)
        except DataError as error:
            # Returned, not raised: the DataLoader would bury the message under a worker's traceback.
            return error


def _start_worker(_: int) -> None:
    end_with_parent()


def _same(arrived: _Arrived) -> _Arrived:
    return arrived
