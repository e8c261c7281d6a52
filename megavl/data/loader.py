"""Loader: the steps of one rank, read, decoded and assembled ahead of the training process."""

import math
from collections import deque
from collections.abc import Iterator

from torch.utils.data import DataLoader, Dataset

from megavl.batch import Batch, Kind, StepBatch
from megavl.data.assemble import Assembler
from megavl.data.errors import DataError
from megavl.data.pack import Pack
from megavl.data.sampler import Sampler, StepPlan
from megavl.data.worker import end_with_parent

_Request = tuple[Kind, tuple[Pack, ...]]


class Loader:
    """Iterates over the step batches of one data-parallel rank, from `first_step` to the end of the run.

    Packs of a global batch are numbered; rank r of dp_size takes the r-th of dp_size equal runs of them, cut into
    micro-batches of `train.micro_batch`. The training process plans, which needs lengths only; worker processes read.
    """

    def __init__(self, sampler: Sampler, dp_rank: int, dp_size: int, with_pixels: bool, first_step: int) -> None:
        """Worker processes start with the iteration.

        Args:
            with_pixels: decode images (ranks that hold the stem); others need no worker process.

        Raises:
            DataError: the global batch does not divide into micro-batches of every rank.
        """
        train, data = sampler.train, sampler.data
        if train.global_batch % (dp_size * train.micro_batch):
            raise DataError(
                f"train.global_batch {train.global_batch} does not divide by {dp_size} data-parallel ranks times "
                f"train.micro_batch {train.micro_batch}; change one of them"
            )
        self._sampler, self._first_step = sampler, first_step
        share = train.global_batch // dp_size
        self._mine = [
            slice(first, first + train.micro_batch)
            for first in range(dp_rank * share, (dp_rank + 1) * share, train.micro_batch)
        ]
        self._workers = data.workers if with_pixels else 0
        self._requests = _Requests(Assembler(sampler.stores, sampler.model, data.seq_len, sampler.eos, with_pixels))
        self._batches: Iterator[Batch | DataError] = iter(())

    def __iter__(self) -> Iterator[StepBatch]:
        """The steps in order.

        Raises:
            DataError: a document of a step cannot be read; the message names it.
        """
        plans: deque[StepPlan] = deque()
        self._batches = iter(self._start(plans))
        for step in range(self._first_step, self._sampler.train.steps):
            micro_batches = tuple(self._next() for _ in self._mine)
            plan = plans.popleft()
            yield StepBatch(
                step=step,
                kind=plan.kind,
                micro_batches=micro_batches,
                supervised_tokens=plan.supervised_tokens,
                tokens=plan.tokens,
                images=plan.images,
                squared_tokens=plan.squared_tokens,
            )

    def close(self) -> None:
        """End the worker processes."""
        self._batches = iter(())

    def _start(self, plans: deque[StepPlan]) -> DataLoader:
        workers = self._workers
        return DataLoader(
            self._requests,
            sampler=self._plan(plans),
            batch_size=None,
            num_workers=workers,
            prefetch_factor=math.ceil(self._sampler.data.prefetch * len(self._mine) / workers) if workers else None,
            collate_fn=_same,
            worker_init_fn=_start_worker,
            # A fork of the training process would inherit its communication threads and its accelerator.
            multiprocessing_context="forkserver" if workers else None,
        )

    def _plan(self, plans: deque[StepPlan]) -> Iterator[_Request]:
        """What to assemble, micro-batch after micro-batch; the DataLoader asks ahead of the batches that it returns."""
        for step in range(self._first_step, self._sampler.train.steps):
            plan = self._sampler.plan(step)
            plans.append(plan)
            for mine in self._mine:
                yield plan.kind, plan.packs[mine]

    def _next(self) -> Batch:
        batch = next(self._batches)
        if isinstance(batch, DataError):
            raise batch
        return batch


class _Requests(Dataset):
    """The DataLoader's data set, which lives in the worker processes; its indices are the requests themselves."""

    def __init__(self, assembler: Assembler) -> None:
        self._assembler = assembler

    def __getitem__(self, request: _Request) -> Batch | DataError:
        try:
            return self._assembler(*request)
        except DataError as error:
            # Returned, not raised: the DataLoader would bury the message under a worker's traceback.
            return error


def _start_worker(_: int) -> None:
    end_with_parent()


def _same(batch: Batch | DataError) -> Batch | DataError:
    return batch
