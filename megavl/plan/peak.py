"""Peak memory of a rank in a step: state, activations in flight, messages of the pipeline, images.

The order of a rank's passes decides how many micro-batches each of its stages holds at a time.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

from megavl.config.recompute import encodes_again
from megavl.config.run import RunConfig
from megavl.plan.activations import feature_bytes, hidden_bytes, item_activations, layout_bytes, tile_activations
from megavl.plan.cost import Count, encoder_parameters, item_parameters
from megavl.plan.mix import ExpectedStep
from megavl.plan.schedule import Pass, Program, programs, stages_of
from megavl.plan.state import StateBytes, state_bytes


@dataclass(frozen=True)
class PeakBytes:
    """Bytes at the peak of a step on one rank.

    activations: those that autograd keeps of all micro-batches in flight
    workspace:   what the running pass needs besides
    messages:    hidden states and gradients that are being sent or received
    images:      where tiles are encoded before the passes: weights, pixels, features, and what autograd keeps
    encoding:    what encoding them and its backward pass need besides; both run outside of the passes
    """

    state: StateBytes
    activations: int
    workspace: int
    messages: int
    images: int
    encoding: int

    @property
    def total(self) -> int:
        passes = self.activations + self.workspace + self.messages
        return self.state.total + self.images + max(passes, self.encoding)


class StepMemory:
    """Memory of the ranks in an expected step, as a function of the stages.

    ranks: of the pipeline
    """

    def __init__(self, config: RunConfig, world: int, step: ExpectedStep):
        parallel, train = config.parallel, config.train
        self._config, self._dp, self.ranks = config, world // parallel.model, parallel.pipeline
        counts = step.counts(train.micro_batch, train.global_batch)
        self._tokens, tiles = counts["tokens"], counts["tiles"]
        self._items = item_activations(
            config,
            tokens=self._tokens,
            supervised_tokens=counts["supervised_tokens"],
            tiles=tiles,
        )
        self._parameters = item_parameters(config)
        # With more micro-batches no more of them are in flight.
        micro_batches = min(train.micro_batches(self._dp), 4 * parallel.num_stages)
        self._moments = [set(_moments(program)) for program in programs(parallel, micro_batches)]
        self._images = _image_bytes(config, self._dp, tiles) if parallel.encodes_ahead else _NO_IMAGES

    def peak(self, rank: int, stages: Sequence[range]) -> PeakBytes:
        """Peak of a step on one pipeline rank.

        Args:
            rank: of the pipeline
            stages: items of the model list on each stage
        """
        hidden = hidden_bytes(self._config, self._tokens)
        held = {stage: stages[stage] for stage in stages_of(rank, self._config.parallel)}
        kept, workspace = {}, {}
        for stage, of_stage in held.items():
            items = [self._items[item] for item in of_stage]
            kept[stage] = sum(item.kept for item in items) + layout_bytes(self._config, self._tokens)
            kept[stage] += hidden * (stage > 0)
            workspace["forward", stage] = max(item.computed for item in items)
            workspace["backward", stage] = max(item.recomputed for item in items)
        activations, needed = max(
            (
                (sum(kept[stage] * count for stage, count in in_flight), workspace[running])
                for running, in_flight in self._moments[rank]
            ),
            key=sum,
        )
        parameters = sum((self._parameters[item] for of_stage in held.values() for item in of_stage), start=Count())
        images = self._images[0 if rank == 0 else 1]
        return PeakBytes(
            state=state_bytes(self._config, parameters, self._dp),
            activations=activations,
            workspace=needed,
            messages=0 if self._config.parallel.pipeline == 1 else 2 * len(held) * hidden,
            images=images.held,
            encoding=images.besides,
        )


def rank_peaks(memories: Sequence[StepMemory], stages: Sequence[range]) -> list[PeakBytes]:
    """Of each pipeline rank the highest peak over the steps of `memories`, which are those of one run."""
    ranks = range(memories[0].ranks)
    return [max((memory.peak(rank, stages) for memory in memories), key=lambda peak: peak.total) for rank in ranks]


# A pass that runs, (kind, stage), and the micro-batches that each stage holds, (stage, number), meanwhile.
_Moment = tuple[tuple[str, int], tuple[tuple[int, int], ...]]


def _moments(program: Program) -> Iterator[_Moment]:
    """Every pass of a rank."""
    in_flight: Counter[int] = Counter()
    for action in program:
        if not isinstance(action, Pass):
            continue
        if action.kind == "forward":
            in_flight[action.stage] += 1
        yield (action.kind, action.stage), tuple(sorted(in_flight.items()))
        if action.kind == "backward":
            in_flight[action.stage] -= 1


class _Images(NamedTuple):
    """`PeakBytes.images` and `PeakBytes.encoding`."""

    held: int
    besides: int


_NO_IMAGES = _Images(0, 0), _Images(0, 0)


def _image_bytes(config: RunConfig, dp: int, tiles: int) -> tuple[_Images, _Images]:
    """Images of pipeline rank 0, and of every other rank, if each micro-batch has `tiles` tiles and the ranks of the
    replica share those of a step evenly."""
    of_step = config.train.micro_batches(dp) * tiles
    mine = ceil(of_step / config.parallel.model)
    encoder = encoder_parameters(config)
    weights, gradients = config.train.element_bytes * encoder.total, 4 * encoder.trainable
    if not tiles:
        return _Images(0, 0), _Images(weights, 0)
    held = mine * 3 * config.model.pixel_tower.image_size**2  # pixels, a byte each
    # A chunk that is encoded again keeps everything meanwhile.
    whole = config.model_copy(update={"train": config.train.model_copy(update={"recompute_towers": False})})
    chunk = tile_activations(whole, min(mine, config.parallel.vision_chunk))
    if encodes_again(config):
        besides = gradients + chunk.kept + chunk.recomputed
    else:
        # The features themselves are freed once they are sent.
        held += tile_activations(config, mine).kept - feature_bytes(config, mine)
        besides = gradients + chunk.recomputed
    # On pipeline rank 0 the features of the step and their gradients, elsewhere a copy of the encoder's weights.
    return _Images(held + 2 * feature_bytes(config, of_step), besides), _Images(held + weights, besides)
