"""Every parameter of a model by name, from its shapes alone.

The names are those of the single process and of checkpoints. Source of the shapes: DeepSeek-VL section 3.1 and the
released `sam.py`, `siglip_vit.py` and `projector.py`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from megavl.config.model import DecoderConfig, ModelConfig, SamConfig, SiglipConfig


@dataclass(frozen=True)
class Parameter:
    """One parameter at its full shape. `tensor_dim` is the dim that is cut over the tensor axis, None where it is whole
    on every rank; `item` is its place in the model list."""

    name: str
    shape: tuple[int, ...]
    item: int
    tensor_dim: int | None = None

    @property
    def size(self) -> int:
        """Elements of the full parameter."""
        return prod(self.shape)

    def local_size(self, tensor: int) -> int:
        """Elements on one of `tensor` ranks."""
        return self.size if self.tensor_dim is None else self.size // tensor


def parameters(config: ModelConfig) -> tuple[Parameter, ...]:
    """All parameters, in the order of the model list."""
    decoder = config.decoder
    found = [Parameter("stem.embedding.weight", (decoder.vocab_size, decoder.width), 0, 0)]
    found += [Parameter(f"stem.siglip.{name}", shape, 0) for name, shape in _siglip(config.siglip)]
    if config.sam is not None:
        found += [Parameter(f"stem.sam.{name}", shape, 0) for name, shape in _sam(config.sam)]
    found += [Parameter(f"stem.adaptor.{name}", shape, 0) for name, shape in _adaptor(config)]
    for index in range(decoder.layers):
        found += [
            Parameter(f"blocks.{index}.{name}", shape, index + 1, tensor_dim)
            for name, shape, tensor_dim in _block(decoder)
        ]
    head = decoder.layers + 1
    found.append(Parameter("head.norm.weight", (decoder.width,), head))
    found.append(Parameter("head.proj.weight", (decoder.vocab_size, decoder.width), head, 0))
    return tuple(found)


_Named = Iterator[tuple[str, tuple[int, ...]]]


def _linear(name: str, d_in: int, d_out: int) -> _Named:
    yield f"{name}.weight", (d_out, d_in)
    yield f"{name}.bias", (d_out,)


def _layer_norm(name: str, width: int) -> _Named:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def _patch_embed(width: int, patch_size: int) -> _Named:
    yield "patch_embed.weight", (width, 3, patch_size, patch_size)
    yield "patch_embed.bias", (width,)


def _siglip(siglip: SiglipConfig) -> _Named:
    width = siglip.width
    yield from _patch_embed(width, siglip.patch_size)
    yield "pos_embed", (1, siglip.grid**2, width)
    for index in range(siglip.layers):
        block = f"blocks.{index}"
        yield from _layer_norm(f"{block}.norm1", width)
        yield from _linear(f"{block}.attn.qkv", width, 3 * width)
        yield from _linear(f"{block}.attn.proj", width, width)
        yield from _layer_norm(f"{block}.norm2", width)
        yield from _linear(f"{block}.mlp.fc1", width, siglip.mlp_width)
        yield from _linear(f"{block}.mlp.fc2", siglip.mlp_width, width)
    yield from _layer_norm("norm", width)


def _sam(sam: SamConfig) -> _Named:
    width, neck = sam.width, sam.neck_width
    yield from _patch_embed(width, sam.patch_size)
    yield "pos_embed", (1, sam.grid, sam.grid, width)
    for index in range(sam.layers):
        block = f"blocks.{index}"
        side = sam.grid if index in sam.global_layers else sam.window
        yield from _layer_norm(f"{block}.norm1", width)
        yield from _linear(f"{block}.attn.qkv", width, 3 * width)
        yield from _linear(f"{block}.attn.proj", width, width)
        yield f"{block}.attn.rel_pos_h", (2 * side - 1, width // sam.heads)
        yield f"{block}.attn.rel_pos_w", (2 * side - 1, width // sam.heads)
        yield from _layer_norm(f"{block}.norm2", width)
        yield from _linear(f"{block}.mlp.lin1", width, sam.mlp_width)
        yield from _linear(f"{block}.mlp.lin2", sam.mlp_width, width)
    for name in ("neck", "neck_hd"):
        yield f"{name}.0.weight", (neck, width, 1, 1)
        yield from _layer_norm(f"{name}.1", neck)
        yield f"{name}.2.weight", (neck, neck, 3, 3)
        yield from _layer_norm(f"{name}.3", neck)
    yield "downsamples.0.weight", (2 * neck, neck, 3, 3)
    yield "downsamples.1.weight", (4 * neck, 2 * neck, 3, 3)
    yield "hd_alpha_downsamples", (1,)


def _adaptor(config: ModelConfig) -> _Named:
    width = config.decoder.width
    if config.sam is None:
        yield from _linear("fc1", config.siglip.width, width)
        yield from _linear("fc2", width, width)
    else:
        yield from _linear("high_up_proj", config.sam.output_width, width // 2)
        yield from _linear("low_up_proj", config.siglip.width, width // 2)
        yield from _linear("proj", width, width)


def _block(decoder: DecoderConfig) -> Iterator[tuple[str, tuple[int, ...], int | None]]:
    width, mlp, kv_width = decoder.width, decoder.mlp_width, decoder.kv_heads * decoder.head_width
    yield "attn_norm.weight", (width,), None
    yield "attn.q_proj.weight", (width, width), 0
    yield "attn.k_proj.weight", (kv_width, width), 0
    yield "attn.v_proj.weight", (kv_width, width), 0
    yield "attn.o_proj.weight", (width, width), 1
    yield "mlp_norm.weight", (width,), None
    yield "mlp.gate_proj.weight", (mlp, width), 0
    yield "mlp.up_proj.weight", (mlp, width), 0
    yield "mlp.down_proj.weight", (width, mlp), 1
