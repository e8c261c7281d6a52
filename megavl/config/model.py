"""Shapes of a model: two vision towers, an adaptor, a decoder.

Source: DeepSeek-VL (arXiv 2403.05525) section 3.1 and the released code. All sizes are in elements, images in pixels.
"""

from collections.abc import Iterator
from typing import Self

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
        yield f"{field} = {whole} does not divide by {by} = {part}"


class SiglipConfig(Section):
    """SigLIP vision transformer on the low-resolution image; `grid`^2 tokens, no class token."""

    image_size: PositiveInt = 384
    patch_size: PositiveInt = 16
    width: PositiveInt = 1024
    layers: PositiveInt = 24
    heads: PositiveInt = 16
    mlp_width: PositiveInt = 4096
    norm_eps: PositiveFloat = 1e-6
    pixel_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    pixel_std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (0.5, 0.5, 0.5)

    @property
    def grid(self) -> int:
        """Patches along one side of the image."""
        return self.image_size // self.patch_size

    def problems(self) -> Iterator[str]:
        yield from _indivisible(self, "image_size", "patch_size")
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


class DecoderConfig(Section):
    """Llama-style decoder: RMSNorm, rotary positions, SwiGLU, untied head."""

    layers: PositiveInt
    width: PositiveInt
    heads: PositiveInt
    kv_heads: PositiveInt
    mlp_width: PositiveInt
    vocab_size: PositiveInt
    max_positions: PositiveInt = 16384
    rope_theta: PositiveFloat = 10000.0
    norm_eps: PositiveFloat = 1e-6

    @property
    def head_width(self) -> int:
        """Channels of one attention head."""
        return self.width // self.heads

    def problems(self) -> Iterator[str]:
        yield from _indivisible(self, "width", "heads")
        yield from _indivisible(self, "heads", "kv_heads")
        if self.head_width % 2:
            yield f"width / heads = {self.head_width} is odd, but rotary positions turn pairs of channels"


class ModelConfig(Section):
    """A DeepSeek-VL model. With `sam` it is the 7B's hybrid encoder; without, the 1.3B's SigLIP alone."""

    name: str
    siglip: SiglipConfig
    sam: SamConfig | None
    decoder: DecoderConfig
    image_token_id: int = Field(ge=0, description="placeholder that an image feature replaces")
    init_std: PositiveFloat = 0.006

    @property
    def image_tokens(self) -> int:
        """Decoder positions that one image takes."""
        return self.siglip.grid**2

    @property
    def layers(self) -> int:
        """Items of the model list: stem, decoder blocks, head."""
        return self.decoder.layers + 2

    def problems(self) -> Iterator[str]:
        if self.image_token_id >= self.decoder.vocab_size:
            yield f"image_token_id = {self.image_token_id} is outside decoder.vocab_size = {self.decoder.vocab_size}"
