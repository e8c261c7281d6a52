"""Sections of a run: what is trained, how it is cut, on what data, with which optimizer, and what is kept."""

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from megavl.config.model import ModelConfig, Section

# Above every sensible timeout, and below what overflows in torch, which counts nanoseconds.
_MONTH_S = 30 * 24 * 3600


# Devices whose memory is known (`megavl.plan.hardware`).
Device = Literal["a100-40g", "a100-80g", "h100", "h200"]


class ParallelConfig(Section):
    """Sizes of the axes; data parallelism is what remains of the world, and expert parallelism divides that."""

    tensor: PositiveInt = 1
    sequence: bool = Field(False, description="sequence parallelism over the tensor axis")
    pipeline: PositiveInt = 1
    expert: PositiveInt = Field(1, description="ranks of the data axis over which the routed experts are split")
    expert_width: Literal["whole", "cut"] = Field(
        "whole",
        description="tensor ranks share the tokens of whole experts, or cut the width of every expert",
    )
    schedule: Literal["1f1b", "interleaved", "dualpipev"] = Field(
        "1f1b", description="order of the passes on a pipeline rank"
    )
    virtual_stages: PositiveInt = Field(
        1, description="stages per pipeline rank; 1f1b has one, interleaved several, dualpipev two"
    )
    stages: Literal["auto"] | tuple[PositiveInt, ...] | None = Field(
        "auto",
        description="items of the model list (stem, blocks, head) on each stage; auto: chosen to balance their work; "
        "null: the same number on each",
    )
    vision: Literal["replicated", "sharded", "pipelined", "balanced"] = Field(
        "replicated",
        description="who encodes images: every tensor rank of the first stage all of a micro-batch, or each its share; "
        "pipelined: all ranks of a replica those of a step, before its passes; balanced: all ranks of the world",
    )
    vision_chunk: PositiveInt = Field(8, description="pipelined and balanced: tiles that a rank encodes at a time")
    zero: Literal[0, 1, 2, 3] = 1
    device: Device | None = Field(None, description="device whose memory the stages have to fit; null: not checked")

    @field_validator("schedule", mode="before")
    @classmethod
    def _without_zero_bubble(cls, value: Any) -> Any:
        if value in ("zero-bubble", "zero_bubble", "zb1p", "zbv"):
            raise ValueError(
                f"{value} is not supported: it fills the bubble with gradients of weights, apart from those of inputs, "
                "but the fused operators compute both in one backward pass, and recomputed activations would have to "
                "stay in memory until both are done; use interleaved, which has the smallest bubble, or dualpipev, "
                "which needs less memory"
            )
        return value

    @field_validator("stages", mode="before")
    @classmethod
    def _one_of_three_kinds(cls, value: Any) -> Any:
        if isinstance(value, list):
            return tuple(value)
        if value in ("auto", None) or isinstance(value, tuple):
            return value
        raise ValueError("write auto, null, or a list with the number of items on each stage, such as [3, 4, 4]")

    @property
    def model(self) -> int:
        """Ranks that hold one replica of the model."""
        return self.tensor * self.pipeline

    @property
    def num_stages(self) -> int:
        """Stages of the whole pipeline."""
        return self.pipeline * self.virtual_stages

    @property
    def encodes_ahead(self) -> bool:
        """Whether the tiles of a step are encoded before its passes, by ranks of all stages, not in the passes of the
        first stage."""
        return self.vision in ("pipelined", "balanced")


class SourceConfig(Section):
    """One indexed dataset, and how much is drawn from it among those of its modality."""

    prefix: str
    weight: PositiveFloat = Field(1.0, description="share of the modality's tokens, on any scale")
    max_epochs: PositiveFloat | None = Field(
        None, description="a run that would read the dataset more often is refused; null: no limit"
    )


_Ratio = Annotated[float, Field(ge=0.0, le=1.0)]


class TextRatioConfig(Section):
    """Probability that a step is text, over the steps (modality warm-up, DeepSeek-VL section 4.4).

    A number in its place is the same probability throughout.
    """

    start: _Ratio = 1.0
    final: _Ratio
    steps: NonNegativeInt = Field(0, description="way from `start` to `final`; 0 is `final` from the first step on")
    shape: Literal["linear", "step"] = "linear"
    milestones: tuple[float, ...] = Field(
        (0.25, 0.5, 0.75, 1.0), description="step: fractions of `steps`; at each the ratio jumps by an equal part"
    )

    @model_validator(mode="before")
    @classmethod
    def _from_number(cls, value: Any) -> Any:
        return {"final": value} if type(value) in (int, float) else value

    @property
    def extremes(self) -> tuple[float, float]:
        """Least and greatest probability of the schedule."""
        return (min(self.start, self.final), max(self.start, self.final)) if self.steps else (self.final, self.final)

    def problems(self) -> Iterator[str]:
        marks = list(self.milestones)
        if not marks or marks != sorted(set(marks)) or not all(0 < mark <= 1 for mark in marks):
            yield f"milestones = {marks} must rise above 0 and up to 1"


class DataConfig(Section):
    """Which documents are read. A step is all text or all multimodal (DeepSeek-VL section 4.4)."""

    tokenizer: str = Field(description="sentencepiece .model or tokenizer.json; its identity must be the datasets' own")
    text: tuple[SourceConfig, ...] = ()
    multimodal: tuple[SourceConfig, ...] = ()
    text_ratio: TextRatioConfig = Field(description="probability that a step is text: a number, or a schedule")
    seq_len: PositiveInt = Field(description="tokens of one pack, image tokens included")
    max_tiles: PositiveInt | None = Field(
        None, description="tiles of one pack at most (an image of DeepSeek-VL is one); null: as its tokens allow"
    )
    workers: NonNegativeInt = Field(2, description="processes that decode images; 0 decodes in the training process")
    prefetch: PositiveInt = Field(2, description="steps that are prepared ahead")
    timeout_s: PositiveFloat = Field(
        300.0, le=_MONTH_S, description="seconds without a batch from the loader workers before the run aborts"
    )
    bad_images: NonNegativeInt = Field(
        0, description="images that may turn out to be broken in the whole run; each is replaced by a blank one"
    )


class ScheduleConfig(Section):
    """Learning rate over the steps: linear warm-up, then the shape."""

    shape: Literal["constant", "cosine", "step"] = "cosine"
    warmup_steps: NonNegativeInt = 0
    final_ratio: NonNegativeFloat = Field(0.0, description="cosine: last learning rate over the peak")
    milestones: tuple[float, ...] = Field((0.8, 0.9), description="step: fractions of the run")
    ratios: tuple[NonNegativeFloat, ...] = Field(
        (0.316, 0.1), description="step: learning rate over the peak from each milestone on"
    )

    def problems(self) -> Iterator[str]:
        marks = list(self.milestones)
        if marks != sorted(set(marks)) or not all(0 < mark < 1 for mark in marks):
            yield f"milestones = {marks} must rise between 0 and 1"
        if len(self.ratios) != len(marks):
            yield f"ratios = {list(self.ratios)} needs one entry per milestone, of which there are {len(marks)}"


class ParameterRule(Section):
    """How the parameters whose name matches are trained. The last rule that matches a name holds."""

    match: str = Field(description="regular expression, searched in the parameter's name")
    lr_multiplier: NonNegativeFloat = Field(1.0, description="0 freezes")

    def matches(self, name: str) -> bool:
        return re.search(self.match, name) is not None

    def problems(self) -> Iterator[str]:
        try:
            re.compile(self.match)
        except re.error as error:
            yield f"match = {self.match!r} is not a regular expression: {error}"


_Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]


class OptimConfig(Section):
    """AdamW and its schedule (DeepSeek-VL Table 4)."""

    lr: PositiveFloat
    betas: tuple[_Fraction, _Fraction] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    grad_clip: NonNegativeFloat = Field(1.0, description="largest global gradient norm; 0 does not clip")
    schedule: ScheduleConfig = ScheduleConfig()
    rules: tuple[ParameterRule, ...] = ()

    def lr_multiplier(self, name: str) -> float:
        """Learning-rate multiplier of a parameter, 0 where it is frozen."""
        matching = [rule.lr_multiplier for rule in self.rules if rule.matches(name)]
        return matching[-1] if matching else 1.0


class BalanceConfig(Section):
    """What keeps routed experts equally busy (DeepSeek-VL2 Table 2); without experts both are 0."""

    auxiliary_weight: NonNegativeFloat = Field(
        0.0, description="of the auxiliary loss of each pack and layer (arXiv 2408.15664, eq. 2)"
    )
    bias_step: NonNegativeFloat = Field(
        0.0, description="after each step the bias of an expert moves by it, up where the load is below the mean"
    )


class TrainConfig(Section):
    """Length and numerics of the run."""

    steps: PositiveInt
    global_batch: PositiveInt = Field(description="packs of one optimizer step")
    micro_batch: PositiveInt = Field(1, description="packs of one forward pass on one rank")
    precision: Literal["fp32", "bf16"] = "bf16"
    seed: NonNegativeInt = 0
    recompute: Literal["off", "selective", "block"] = Field(
        "off",
        description="part of the decoder that the backward pass recomputes: selective: norms, SwiGLU, rows of routed "
        "experts and all-gathers, but no matrix product; block: whole blocks",
    )
    recompute_towers: bool = Field(
        False, description="whether the backward pass recomputes the blocks of SigLIP and SAM"
    )
    compile: bool = Field(False, description="whether torch compiles the blocks of the decoder")
    timeout_s: PositiveFloat = Field(
        600.0, le=_MONTH_S, description="seconds that a collective of the training may take before the run aborts"
    )

    @property
    def element_bytes(self) -> int:
        """Bytes of an element of a weight or an activation."""
        return 2 if self.precision == "bf16" else 4

    def micro_batches(self, dp: int) -> int:
        """Micro-batches of a step on each of `dp` data-parallel ranks."""
        return self.global_batch // (dp * self.micro_batch)


class OpsConfig(Section):
    """Which implementation serves each op. A name forces it, and the run is refused where it cannot serve; auto takes
    the fastest of those that this machine has and that agree with torch's."""

    attention: Literal["auto", "torch", "varlen_attn", "flash_attn"] = "auto"
    rms_norm: Literal["auto", "torch", "apex", "triton"] = Field(
        "auto", description="also of the residual addition before a norm"
    )
    swiglu: Literal["auto", "torch", "triton"] = "auto"
    rotary: Literal["auto", "torch", "triton"] = "auto"
    cross_entropy: Literal["auto", "torch", "triton"] = "auto"
    router: Literal["auto", "torch", "mm"] = Field("auto", description="product of the tokens with a router's weight")
    permutation: Literal["auto", "torch", "triton"] = "auto"
    grouped_linear: Literal["auto", "torch", "grouped_mm", "triton", "grouped_gemm"] = "auto"
    expert_mlp: Literal["auto", "torch", "triton"] = Field("auto", description="SwiGLU layers of the routed experts")


class CheckpointConfig(Section):
    """When the state of the run is written, and from where it starts."""

    every: PositiveInt = Field(1000, description="steps between two checkpoints; the last step always writes one")
    keep: PositiveInt = Field(2, description="newest checkpoints that stay on disk")
    init_from: str | None = Field(
        None, description="checkpoint whose weights start a new run; the rest of it is not read"
    )


class LogConfig(Section):
    """What the run shows besides metrics.jsonl, which gets every step."""

    every: PositiveInt = Field(1, description="steps between two console lines")
    tensorboard: bool = True


class RunConfig(Section):
    """One run, whole."""

    output_dir: str
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig
    optim: OptimConfig
    balance: BalanceConfig = BalanceConfig()
    train: TrainConfig
    ops: OpsConfig = OpsConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    def zero_stage(self, dp: int) -> int:
        """The ZeRO stage that DeepSpeed is told on `dp` data-parallel ranks.

        Over one rank ZeRO-1 partitions nothing, but in fp32 DeepSpeed would keep a second copy of parameters and
        gradients. In bf16 it has the fp32 masters and gradients.
        """
        alone = self.parallel.zero == 1 and dp == 1 and self.train.precision == "fp32"
        return 0 if alone else self.parallel.zero
