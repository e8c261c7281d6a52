"""Parameters and floating-point operations of a run, from its configuration alone."""

from dataclasses import dataclass
from functools import lru_cache

from megavl.config.model import ModelConfig
from megavl.config.parameters import dataflow, parameters, parameters_of_encoder
from megavl.config.recompute import encodes_again
from megavl.config.run import RunConfig
from megavl.plan.flops import FlopCounter
from megavl.plan.work import Work


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of one optimizer step over all ranks.

    model:    numerator of MFU
    hardware: model and overhead, repeated work counted on every tensor rank

    Not counted: gradients that a pipeline sends into stages with nothing trainable before them, and the zeros that fill
    the values of latent attention up to the width of its keys.
    """

    model: int
    hardware: int


@dataclass(frozen=True)
class Count:
    """Parameters in elements. Counts add up field by field.

    experts: those of routed experts among the trainable ones
    """

    trainable: int = 0
    frozen: int = 0
    experts: int = 0

    def __add__(self, other: "Count") -> "Count":
        return Count(self.trainable + other.trainable, self.frozen + other.frozen, self.experts + other.experts)

    @property
    def total(self) -> int:
        return self.trainable + self.frozen


def item_parameters(config: RunConfig) -> tuple[Count, ...]:
    """Parameters of each item of the model list on one rank that holds it."""
    trainable, frozen, experts = ([0] * config.model.layers for _ in range(3))
    for parameter in parameters(config.model):
        size = parameter.local_size(config.parallel)
        if not (parameter.trained and config.optim.lr_multiplier(parameter.name)):
            frozen[parameter.item] += size
            continue
        trainable[parameter.item] += size
        if parameter.expert_dim is not None:
            experts[parameter.item] += size
    return tuple(map(Count, trainable, frozen, experts))


def encoder_parameters(config: RunConfig) -> Count:
    """Parameters of the vision encoder, on one rank that encodes images."""
    sizes = {True: 0, False: 0}
    for parameter in parameters_of_encoder(config.model):
        sizes[config.optim.lr_multiplier(parameter.name) > 0] += parameter.size
    return Count(trainable=sizes[True], frozen=sizes[False])


def active_parameters(model: ModelConfig) -> int:
    """Parameters used by one token and one image: `per_token` of the routed experts, without the token embedding (as
    DeepSeek-VL2 Table 2 counts)."""
    active = 0
    for parameter in parameters(model):
        if parameter.expert_dim is not None:
            active += parameter.product.rows * parameter.product.d_in * parameter.product.d_out
        elif parameter.name != "stem.embedding.weight":
            active += parameter.size
    return active


def item_work(
    config: RunConfig, *, tokens: int, supervised_tokens: int, squared_tokens: int, tiles: int
) -> tuple[Work, ...]:
    """Work of each item of the model list over a step. What is frozen is read from the optimizer's rules, what is
    recomputed from `train.recompute` and `train.recompute_towers`: selective recomputation repeats no product.

    Args:
        tokens: those of images included
        supervised_tokens: those with a label; the others have no logits
        squared_tokens: sum over the documents of their lengths squared
        tiles: of all images; an image of DeepSeek-VL is one
    """
    return _item_work(config, True, tokens, supervised_tokens, squared_tokens, tiles)


@dataclass(frozen=True)
class PassFlops:
    """FLOPs of one rank in the passes of an item; `backward` includes what is recomputed there."""

    forward: float
    backward: float

    @property
    def both(self) -> float:
        return self.forward + self.backward


def item_passes(
    config: RunConfig, *, tokens: int, supervised_tokens: int, squared_tokens: int, tiles: int
) -> tuple[PassFlops, ...]:
    """FLOPs of one tensor rank in the passes of each item; the arguments are those of `item_work`."""
    counts, tensor = (tokens, supervised_tokens, squared_tokens, tiles), config.parallel.tensor
    forward, both = (
        [work.on_tensor_ranks(tensor) / tensor for work in _item_work(config, trains, *counts)]
        for trains in (False, True)
    )
    return tuple(PassFlops(first, total - first) for first, total in zip(forward, both, strict=True))


def _item_work(
    config: RunConfig, trains: bool, tokens: int, labels: int, squared_tokens: int, tiles: int
) -> tuple[Work, ...]:
    """Without training the work of the forward pass alone."""
    pairs = (squared_tokens + tokens) // 2
    return tuple(
        of_token * tokens + of_label * labels + of_pair * pairs + of_tile * tiles
        for of_token, of_label, of_pair, of_tile in zip(*_unit_works(config, trains), strict=True)
    )


@lru_cache(maxsize=16)
def _unit_works(config: RunConfig, trains: bool) -> tuple[tuple[Work, ...], ...]:
    """Work of each item for one token, label, pair of query and key, and tile, in which it is linear; without training
    that of the forward pass."""
    return tuple(_works(config, trains, **{unit: 1}) for unit in ("tokens", "labels", "pairs", "tiles"))


def _works(
    config: RunConfig, trains: bool, *, tokens: int = 0, labels: int = 0, pairs: int = 0, tiles: int = 0
) -> tuple[Work, ...]:
    # Where tiles are encoded before the passes, whole chunks of them are recomputed, and no blocks.
    recomputed = {
        "decoder": config.train.recompute == "block",
        "tower": config.train.recompute_towers and not config.parallel.encodes_ahead,
    }
    counter = FlopCounter(
        trains=lambda name: trains and config.optim.lr_multiplier(name) > 0,
        recomputes=recomputed.__getitem__,
        tokens=tokens,
        labels=labels,
        pairs=pairs,
        tiles=tiles,
        micro_batch=config.train.micro_batch,
        parallel=config.parallel,
    )
    works, live = [], False
    for flow in dataflow(config.model):
        work, live = counter.work(flow, live)
        works.append(work)
    if trains and encodes_again(config):
        works[0] += counter.repeated_forward(dataflow(config.model)[0])
    return tuple(works)


def step_flops(config: RunConfig, *, tokens: int, supervised_tokens: int, squared_tokens: int, tiles: int) -> StepFlops:
    """FLOPs of one step of the whole global batch; the arguments are those of `item_work`."""
    works = item_work(
        config, tokens=tokens, supervised_tokens=supervised_tokens, squared_tokens=squared_tokens, tiles=tiles
    )
    return StepFlops(
        model=sum(work.model for work in works),
        hardware=sum(work.on_tensor_ranks(config.parallel.tensor) for work in works),
    )
