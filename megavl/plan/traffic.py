"""Bytes that a rank sends, by axis, from the configuration alone.

Those of the tensor and the expert axis come with every micro-batch, forward and backward, those of the pipeline with
every border between stages, those of the data axis once a step. Routed experts are taken to be equally busy.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from megavl.config.run import RunConfig
from megavl.plan.activations import feature_bytes, hidden_bytes
from megavl.plan.cost import Count, encoder_parameters, item_parameters
from megavl.plan.forward import operations
from megavl.plan.message import Message
from megavl.plan.mix import ExpectedStep
from megavl.plan.schedule import rank_of, stages_of
from megavl.plan.split import split_model
from megavl.plan.tape import sent_backward, sent_forward


@dataclass(frozen=True)
class Traffic:
    """Messages of one micro-batch on one rank, over the tensor and the expert axis. backward: with those that are
    repeated where activations are computed again."""

    forward: tuple[Message, ...]
    backward: tuple[Message, ...]

    @property
    def messages(self) -> tuple[Message, ...]:
        return self.forward + self.backward


def item_traffic(config: RunConfig, *, tokens: int, supervised_tokens: int, tiles: int) -> tuple[Traffic, ...]:
    """Traffic of each item of the model list: stem, decoder blocks, head. The arguments are those of
    `megavl.plan.forward.operations`."""
    items = operations(config, tokens=tokens, supervised_tokens=supervised_tokens, tiles=tiles)
    return tuple(Traffic(tuple(sent_forward(item)), tuple(sent_backward(item))) for item in items)


def border_messages(config: RunConfig, stage: int, tokens: int) -> tuple[Message, ...]:
    """What the rank of a stage sends of one micro-batch to the ranks of its neighbours: hidden states to the next
    stage, their gradient to the one before. Neighbours on one rank exchange nothing."""
    parallel = config.parallel
    message = Message("pipeline", "send", hidden_bytes(config, tokens), parallel.pipeline)
    neighbours = (other for other in (stage - 1, stage + 1) if 0 <= other < parallel.num_stages)
    return tuple(message for other in neighbours if rank_of(other, parallel) != rank_of(stage, parallel))


def data_messages(config: RunConfig, parameters: Count, dp: int, micro_batches: int) -> tuple[Message, ...]:
    """Gradients and parameters of a step over the data axis, of a rank that holds `parameters` (of all its stages).

    ZeRO-0 all-reduces the gradients in fp32; ZeRO-1 reduces to each rank its part of them, and gathers the updated
    parameters; ZeRO-2 reduces so after each micro-batch; ZeRO-3 gathers the parameters, frozen ones too, for each
    forward and each backward pass instead of after the update. Routed experts have dp / `parallel.expert` replicas.
    DeepSpeed's own padding, and its choice of algorithms under ZeRO-2 and 3 and in fp32, are not counted.
    """
    zero, element = config.zero_stage(dp), config.train.element_bytes
    experts = parameters.experts if config.parallel.expert > 1 else 0
    messages: list[Message] = []
    for trained, held, ranks in (
        (parameters.trainable - experts, parameters.total - experts, dp),
        (experts, experts, dp // config.parallel.expert),
    ):
        if ranks == 1 or not held:
            continue
        reduced = Message("data", "all_reduce" if zero == 0 else "reduce_scatter", 4 * trained, ranks)
        messages += [reduced] * (micro_batches if zero >= 2 else 1)
        if zero in (1, 2):
            messages.append(Message("data", "all_gather", element * trained, ranks))
        if zero == 3:
            messages += [Message("data", "all_gather", element * held, ranks)] * (2 * micro_batches)
    return tuple(messages)


def rank_traffic(config: RunConfig, world: int, step: ExpectedStep) -> tuple[dict[str, float], ...]:
    """Bytes that one rank of each pipeline rank sends in an expected step, by axis; "images" are what
    `parallel.vision: pipelined, balanced` sends."""
    parallel, train, dp = config.parallel, config.train, world // config.parallel.model
    counts = step.counts(train.micro_batch, train.global_batch)
    tokens, tiles = counts["tokens"], counts["tiles"]
    items = item_traffic(
        config,
        tokens=tokens,
        supervised_tokens=counts["supervised_tokens"],
        tiles=0 if parallel.encodes_ahead else tiles,
    )
    parameters, stages, micro_batches = item_parameters(config), split_model(config, world), train.micro_batches(dp)
    found = []
    for rank in range(parallel.pipeline):
        sent: Counter[str] = Counter()
        held = [item for stage in stages_of(rank, parallel) for item in stages[stage]]
        for item in held:
            sent.update(_sent(items[item].messages, micro_batches))
        for stage in stages_of(rank, parallel):
            sent.update(_sent(border_messages(config, stage, tokens), micro_batches))
        of_rank = sum((parameters[item] for item in held), start=Count())
        sent.update(_sent(data_messages(config, of_rank, dp, micro_batches)))
        if parallel.encodes_ahead and tiles:
            sent["images"] = _sent_for_images(config, rank, micro_batches * tiles)
        found.append(dict(sent))
    return tuple(found)


def _sent_for_images(config: RunConfig, rank: int, tiles: int) -> float:
    """Bytes that a rank sends for the tiles of a step of its replica, which all ranks of the replica share evenly.

    Features go from each to every tensor rank of pipeline rank 0, gradients back, each from one of these. Trained
    weights are broadcast over the pipeline once a step, and their fp32 gradients reduced: chains, in which a rank sends
    once.
    """
    parallel, element = config.parallel, config.train.element_bytes
    features, trained = feature_bytes(config, tiles), encoder_parameters(config).trainable
    copies = parallel.tensor - (rank == 0)  # a rank keeps its own
    sent = features / parallel.model * copies
    if not trained:
        return sent
    broadcast = element * trained * (rank < parallel.pipeline - 1)
    if rank == 0:
        returned = features / parallel.tensor * (1 - 1 / parallel.model)
        return sent + returned + broadcast
    return sent + 4 * trained + broadcast


def _sent(messages: Iterable[Message], times: int = 1) -> Counter[str]:
    sent: Counter[str] = Counter()
    for message in messages:
        sent[message.axis] += message.sent * times
    return sent
