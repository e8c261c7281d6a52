"""Shapes of a model: vision towers, an adaptor, a decoder.

Sources: DeepSeek-VL (arXiv 2403.05525) section 3.1, DeepSeek-VL2 (arXiv 2412.10302) section 3 and the released code of
both. All sizes are in elements, images in pixels.
"""

from collections.abc import Iterator
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator


class Section(BaseModel):
    """A frozen part of a configuration; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def problems(self) -> Iterator[str]:
        """What is wrong between the fields of this section, one line each."""
        yield from ()

    @model_validator(mode="after")
    def _refuse_problems(self) -> Self:
        if problems := list(self.problems()):
            raise ValueError("\n".join(problems))
        return self


def _indivisible(section: Section, field: str, by: str) -> Iterator[str]:
    whole, part = getattr(section, field), getattr(section, by)
    if whole % part:
        yield f"{field} = {whole} is not divisible by {by} = {part}"


class SiglipConfig(Section):
    """SigLIP vision transformer on one square image or tile; `grid`^2 tokens, no class token. Pixels behind the last
    whole patch are not read: 6 of 384 on two sides with the patches of 14 of SO400M."""

    image_size: PositiveInt = 384
    patch_size: PositiveInt = 16
    width: PositiveInt = 1024
    layers: PositiveInt = 24
    heads: PositiveInt = 16
    mlp_width: PositiveInt = 4096
    gelu_approximation: Literal["none", "tanh"] = Field(
        "none", description="of the activation; the code of DeepSeek-VL has none, that of DeepSeek-VL2 tanh"
    )
    norm_eps: PositiveFloat = 1e-6
    pixel_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    pixel_std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (0.5, 0.5, 0.5)

    @property
    def grid(self) -> int:
        """Patches along one side of the image."""
        return self.image_size // self.patch_size

    def problems(self) -> Iterator[str]:
        if self.patch_size > self.image_size:
            yield f"patch_size = {self.patch_size} is above image_size = {self.image_size}: there would be no patch"
        yield from _indivisible(self, "width", "heads")


class SamConfig(Section):
    """SAM-B (ViTDet) on the high-resolution image, its two necks and the strided convolutions."""

    image_size: PositiveInt = 1024
    patch_size: PositiveInt = 16
    width: PositiveInt = 768
    layers: PositiveInt = 12
    heads: PositiveInt = 12
    mlp_width: PositiveInt = 3072
    window: PositiveInt = 14
    global_layers: tuple[int, ...] = (2, 5, 8, 11)
    neck_width: PositiveInt = 256
    norm_eps: PositiveFloat = 1e-6
    pixel_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    pixel_std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (0.26862954, 0.26130258, 0.27577711)

    @property
    def grid(self) -> int:
        """Patches along one side of the image."""
        return self.image_size // self.patch_size

    @property
    def first_global(self) -> int:
        """The block whose output `neck_hd` reads."""
        return self.global_layers[0]

    @property
    def output_width(self) -> int:
        """Channels after the two convolutions of stride 2, each of which doubles them."""
        return 4 * self.neck_width

    def problems(self) -> Iterator[str]:
        yield from _indivisible(self, "image_size", "patch_size")
        yield from _indivisible(self, "width", "heads")
        blocks = self.global_layers
        if not blocks or list(blocks) != sorted(set(blocks)) or blocks[0] < 0 or blocks[-1] >= self.layers:
            yield (
                f"global_layers = {list(blocks)} must rise within 0 ... {self.layers - 1} (layers = {self.layers}) "
                "and name at least one, whose output feeds neck_hd"
            )


class MlaConfig(Section):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1), queries uncompressed.

    kv_rank:     channels of the latent from which keys and values of all heads are made
    nope_width:  channels of a query or key without a position
    rope_width:  channels with one; of keys, all heads share them
    value_width: channels of a value
    """

    kv_rank: PositiveInt = 512
    nope_width: PositiveInt = 128
    rope_width: PositiveInt = 64
    value_width: PositiveInt = 128

    @property
    def key_width(self) -> int:
        """Channels of a query or key of one head."""
        return self.nope_width + self.rope_width

    def problems(self) -> Iterator[str]:
        if self.rope_width % 2:
            yield f"rope_width = {self.rope_width} is odd, but rotary positions turn pairs of channels"


class MoeConfig(Section):
    """Feed-forward layer of shared and routed experts (DeepSeekMoE, arXiv 2401.06066), dropless.

    router: scores by softmax over the experts, or by a sigmoid each, with a bias per expert that takes part in the
            selection alone (arXiv 2408.15664)
    """

    experts: PositiveInt = Field(description="routed experts of a layer")
    per_token: PositiveInt = Field(description="routed experts that a token goes through")
    shared: PositiveInt = Field(description="experts that every token goes through; they are one, as wide as all")
    width: PositiveInt = Field(description="channels within one expert")
    dense_layers: int = Field(1, ge=0, description="first layers, which have an ordinary feed-forward layer instead")
    router: Literal["softmax", "sigmoid"] = "softmax"
    normalise: bool = Field(False, description="the weights of a token's experts are divided by their sum")
    scale: PositiveFloat = Field(1.0, description="factor of the weights")

    @property
    def shared_width(self) -> int:
        """Channels within the shared experts together."""
        return self.shared * self.width

    def problems(self) -> Iterator[str]:
        if self.per_token > self.experts:
            yield f"per_token = {self.per_token} is above experts = {self.experts}: a token goes to different experts"


class DecoderConfig(Section):
    """Decoder: RMSNorm, rotary positions, SwiGLU, untied head. As it stands DeepSeek-LLM's (Llama's); with `moe`
    DeepSeekMoE's, and with `mla` one of latent attention (`kv_heads` is then `heads`, and has no other meaning)."""

    layers: PositiveInt
    width: PositiveInt
    heads: PositiveInt
    kv_heads: PositiveInt
    mlp_width: PositiveInt
    vocab_size: PositiveInt
    max_positions: PositiveInt = 16384
    rope_theta: PositiveFloat = 10000.0
    norm_eps: PositiveFloat = 1e-6
    mla: MlaConfig | None = None
    moe: MoeConfig | None = None

    @property
    def head_width(self) -> int:
        """Channels of one head of ordinary attention."""
        return self.width // self.heads

    def has_experts(self, layer: int) -> bool:
        """Whether the feed-forward layer of block `layer` is a mixture of experts."""
        return self.moe is not None and layer >= self.moe.dense_layers

    def problems(self) -> Iterator[str]:
        yield from _indivisible(self, "heads", "kv_heads")
        if self.mla is not None:
            if self.kv_heads != self.heads:
                yield f"kv_heads = {self.kv_heads}, but with mla each of heads = {self.heads} has one: make it equal"
        else:
            yield from _indivisible(self, "width", "heads")
            if self.head_width % 2:
                yield f"width / heads = {self.head_width} is odd, but rotary positions turn pairs of channels"
        if self.moe is not None and self.moe.dense_layers >= self.layers:
            yield f"moe.dense_layers = {self.moe.dense_layers} leaves none of layers = {self.layers} for experts"


class TilingConfig(Section):
    """Dynamic tiling (DeepSeek-VL2 section 3): an image is an overview and a grid of local tiles, each as large as the
    tower's image. `megavl.config.tiles` has the rules."""

    max_tiles: PositiveInt = Field(9, description="local tiles of one image at most")
    max_images: PositiveInt = Field(2, description="a document with more images has one local tile for each")
    shuffle: PositiveInt = Field(2, description="side of the square of patches that becomes one token (pixel shuffle)")


class ModelConfig(Section):
    """A DeepSeek-VL or DeepSeek-VL2 model.

    With `sam` it is the 7B's hybrid encoder, with `tiling` a VL2 model; with neither the 1.3B's SigLIP alone.
    """

    name: str
    siglip: SiglipConfig
    sam: SamConfig | None
    tiling: TilingConfig | None = None
    decoder: DecoderConfig
    image_token_id: int = Field(ge=0, description="placeholder that an image feature replaces")
    init_std: PositiveFloat = 0.006

    @property
    def family(self) -> Literal["vl", "vl2"]:
        """Which of the two papers it is of; the templates of conversations have the same names."""
        return "vl" if self.tiling is None else "vl2"

    @property
    def pixel_tower(self) -> SiglipConfig | SamConfig:
        """The tower whose square image a batch holds: SAM, from whose image SigLIP's is resized, or SigLIP alone."""
        return self.sam or self.siglip

    @property
    def feature_grid(self) -> int:
        """Features along one side of an image or tile, as the adaptor gives them to the decoder."""
        return self.siglip.grid if self.tiling is None else -(-self.siglip.grid // self.tiling.shuffle)

    @property
    def tile_features(self) -> int:
        """Features of one image or tile."""
        return self.feature_grid**2

    @property
    def layers(self) -> int:
        """Items of the model list: stem, decoder blocks, head."""
        return self.decoder.layers + 2

    def problems(self) -> Iterator[str]:
        if self.image_token_id >= self.decoder.vocab_size:
            yield f"image_token_id = {self.image_token_id} is outside decoder.vocab_size = {self.decoder.vocab_size}"
        if self.sam is not None and self.tiling is not None:
            yield "sam and tiling exclude each other: the hybrid encoder is DeepSeek-VL's, tiles are DeepSeek-VL2's"
