"""Parameters and floating-point operations of a run, from its configuration alone."""

from dataclasses import dataclass

from megavl.config.model import ModelConfig
from megavl.config.parameters import dataflow, parameters
from megavl.config.run import RunConfig
from megavl.plan.flops import FlopCounter
from megavl.plan.work import Work


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of one optimizer step over all ranks. `model` is what MFU is made of; `hardware` is what the devices
    compute: with the overhead, and on every tensor rank what each repeats. (A pipeline also sends gradients into stages
    with nothing trainable before them, and fused attention fills the values of latent attention up to the width of its
    keys; those are in neither.)"""

    model: int
    hardware: int


@dataclass(frozen=True)
class Count:
    """Parameters in elements. `experts` are those of routed experts among the trainable ones."""

    trainable: int
    frozen: int
    experts: int

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


def active_parameters(model: ModelConfig) -> int:
    """Elements that a token and an image are multiplied with: of the routed experts those of one token, and not the
    token embedding, in which it is looked up (so counts DeepSeek-VL2 Table 2)."""
    active = 0
    for parameter in parameters(model):
        if parameter.expert_dim is not None:
            active += parameter.product.rows * parameter.product.d_in * parameter.product.d_out
        elif parameter.name != "stem.embedding.weight":
            active += parameter.size
    return active


def item_work(config: RunConfig, *, tokens: int, squared_tokens: int, tiles: int) -> tuple[Work, ...]:
    """Work of each item of the model list over `tokens` tokens (those of images included) in documents whose squared
    lengths add up to `squared_tokens`, with `tiles` tiles among them (an image of DeepSeek-VL is one). What is frozen
    is read from the optimizer's rules, what is recomputed from `train.recompute`."""
    counter = FlopCounter(
        trains=lambda name: config.optim.lr_multiplier(name) > 0,
        tokens=tokens,
        pairs=(squared_tokens + tokens) // 2,
        tiles=tiles,
        micro_batch=config.train.micro_batch,
        parallel=config.parallel,
    )
    works, live = [], False
    for item, flow in enumerate(dataflow(config.model)):
        work, live = counter.work(flow, live)
        is_block = 0 < item < config.model.layers - 1
        if is_block and live and config.train.recompute == "full":
            work += counter.recomputation(flow)
        works.append(work)
    return tuple(works)


def step_flops(config: RunConfig, *, tokens: int, squared_tokens: int, tiles: int) -> StepFlops:
    """FLOPs of one step of the whole global batch; the arguments are those of `item_work`."""
    works = item_work(config, tokens=tokens, squared_tokens=squared_tokens, tiles=tiles)
    return StepFlops(
        model=sum(work.model for work in works),
        hardware=sum(work.on_tensor_ranks(config.parallel.tensor) for work in works),
    )
