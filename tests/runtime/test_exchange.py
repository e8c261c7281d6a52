"""Memory of a pipeline of two ranks does not grow with the number of micro-batches, on gloo and with NCCL's works."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from unittest import mock

import pytest
import torch.distributed as dist

from megavl.config.run import RunConfig
from megavl.rehearsal.storages import Storages
from tests.runtime.cases import SEQ_LEN, build, run_config, step_batch

SCHEDULES = {
    "1f1b": {},
    "interleaved": {"schedule": "interleaved", "virtual_stages": 2},
    "dualpipev": {"schedule": "dualpipev", "virtual_stages": 2},
}
COUNTS = (8, 16)  # micro-batches: at least two a stage


class _WholeBatch:
    """A work of NCCL: that of a whole batch. It can be waited for several times, those of gloo once."""

    def __init__(self, works: list[dist.Work]):
        self._works = works

    def wait(self) -> None:
        while self._works:
            self._works.pop().wait()


_batch_isend_irecv = dist.batch_isend_irecv


def _as_nccl(operations: list[dist.P2POp]) -> list[_WholeBatch]:
    return [_WholeBatch(_batch_isend_irecv(operations))]


# What is put in the place of something, by name.
CHANGES = {
    "": {},
    "nccl": {"torch.distributed.batch_isend_irecv": _as_nccl},
    "sends pend until the end": {"megavl.runtime.exchange.BATCHES_PENDING": 1000},
    "outputs are kept": {"megavl.runtime.pipeline.get_gradient_edge": lambda output: output},
}


@dataclass(frozen=True)
class Measured:
    """By number of micro-batches: most bytes in use during a step and during an evaluation, and the loss."""

    train: dict[int, int]
    evaluate: dict[int, int]
    loss: dict[int, float]


def measure(config: RunConfig, changes: list[str]) -> list[Measured]:
    replica = build(config)
    text = step_batch(1, config, replica.mesh)
    batches = {count: replace(text, micro_batches=text.micro_batches[:1] * count) for count in COUNTS}
    replica.pipeline.train(batches[COUNTS[0]])  # DeepSpeed makes its buffers for gradients

    def peak(run: Callable) -> tuple[int, float]:
        with Storages() as storages:
            loss = run()
        return storages.peak, loss.item()

    found = []
    for change in changes:
        with ExitStack() as stack:
            for name, value in CHANGES[change].items():
                stack.enter_context(mock.patch(name, value))
            train = {count: peak(lambda b=batch: replica.pipeline.train(b)) for count, batch in batches.items()}
            evaluate = {count: peak(lambda b=batch: replica.pipeline.evaluate(b)) for count, batch in batches.items()}
        peaks = [{count: most for count, (most, _) in of.items()} for of in (train, evaluate)]
        found.append(Measured(*peaks, {count: loss for count, (_, loss) in train.items()}))
    return found


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_memory_does_not_grow_with_the_number_of_micro_batches(pool, schedule):
    config = run_config(2, parallel={"pipeline": 2, "zero": 0} | SCHEDULES[schedule], train={"micro_batch": 1})
    hidden = 4 * SEQ_LEN * config.model.decoder.width  # bytes
    few, many = COUNTS
    losses = 4 * (many - few)  # bytes, on the rank with the head
    for gloo, nccl, pending, kept in pool.run(2, measure, config, list(CHANGES)):
        assert nccl == gloo
        for peak in (gloo.train, gloo.evaluate):
            assert peak[few] <= peak[many] <= peak[few] + losses
        # The limit is what bounds it: each further micro-batch would keep what the rank sends of it.
        assert pending.train[many] >= pending.train[few] + (many - few) * hidden
        # Messages that have left are not kept by the graphs. With one stage a rank they are still pending at the peak.
        assert kept.train[many] > gloo.train[many] or schedule == "1f1b"
