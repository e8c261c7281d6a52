"""Every parameter of a model by name, from its shapes alone.

The names are those of the single process and of checkpoints. Source of the shapes: DeepSeek-VL section 3.1 and the
released `sam.py`, `siglip_vit.py` and `projector.py`; DeepSeek-VL2 Table 1 and the released `modeling_deepseek.py`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

from megavl.config.model import DecoderConfig, MlaConfig, ModelConfig, MoeConfig, SamConfig, SiglipConfig
from megavl.config.run import ParallelConfig


@dataclass(frozen=True)
class Parameter:
    """One parameter at its full shape; `item` is its place in the model list.

    tensor_dim: the dim that is cut over the tensor axis, None where it is whole on every rank; that of routed experts
                is cut only where the run says so (`parallel.expert_width`)
    expert_dim: the dim that is cut over the expert axis, None where the parameter is not one of routed experts
    trained:    whether an optimizer may change it; the bias of a router is moved by its own rule
    """

    name: str
    shape: tuple[int, ...]
    item: int
    tensor_dim: int | None = None
    expert_dim: int | None = None
    trained: bool = True

    @property
    def size(self) -> int:
        """Elements of the full parameter."""
        return prod(self.shape)

    def local_size(self, parallel: ParallelConfig) -> int:
        """Elements on one rank that holds its item."""
        size = self.size
        if self.tensor_dim is not None and (self.expert_dim is None or parallel.expert_width == "cut"):
            size //= parallel.tensor
        return size if self.expert_dim is None else size // parallel.expert


def parameters(config: ModelConfig) -> tuple[Parameter, ...]:
    """All parameters, in the order of the model list."""
    decoder = config.decoder
    found = [Parameter("stem.embedding.weight", (decoder.vocab_size, decoder.width), 0, 0)]
    found += [Parameter(f"stem.siglip.{name}", shape, 0) for name, shape in _siglip(config.siglip)]
    if config.sam is not None:
        found += [Parameter(f"stem.sam.{name}", shape, 0) for name, shape in _sam(config.sam)]
    found += [Parameter(f"stem.adaptor.{name}", shape, 0) for name, shape in _adaptor(config)]
    if config.tiling is not None:
        found += [Parameter(f"stem.{name}", (decoder.width,), 0) for name in ("newline", "separator")]
    for index in range(decoder.layers):
        found += [replace(part, name=f"blocks.{index}.{part.name}", item=index + 1) for part in _block(decoder, index)]
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
        square = 1 if config.tiling is None else config.tiling.shuffle**2
        yield from _linear("fc1", config.siglip.width * square, width)
        yield from _linear("fc2", width, width)
    else:
        yield from _linear("high_up_proj", config.sam.output_width, width // 2)
        yield from _linear("low_up_proj", config.siglip.width, width // 2)
        yield from _linear("proj", width, width)


def _weight(name: str, shape: tuple[int, ...], tensor_dim: int | None = None) -> Parameter:
    """One of a block, whose place is not known here."""
    return Parameter(f"{name}.weight", shape, 0, tensor_dim)


def _block(decoder: DecoderConfig, layer: int) -> Iterator[Parameter]:
    yield _weight("attn_norm", (decoder.width,))
    yield from _attention(decoder) if decoder.mla is None else _mla(decoder, decoder.mla)
    yield _weight("mlp_norm", (decoder.width,))
    if decoder.has_experts(layer):
        yield from _moe(decoder.moe, decoder.width)
    else:
        yield from _mlp("mlp", decoder.width, decoder.mlp_width)


def _attention(decoder: DecoderConfig) -> Iterator[Parameter]:
    width, kv_width = decoder.width, decoder.kv_heads * decoder.head_width
    yield _weight("attn.q_proj", (width, width), 0)
    yield _weight("attn.k_proj", (kv_width, width), 0)
    yield _weight("attn.v_proj", (kv_width, width), 0)
    yield _weight("attn.o_proj", (width, width), 1)


def _mla(decoder: DecoderConfig, mla: MlaConfig) -> Iterator[Parameter]:
    width, heads = decoder.width, decoder.heads
    yield _weight("attn.q_proj", (heads * mla.key_width, width), 0)
    yield _weight("attn.kv_down_proj", (mla.kv_rank + mla.rope_width, width))
    yield _weight("attn.kv_norm", (mla.kv_rank,))
    yield _weight("attn.kv_up_proj", (heads * (mla.nope_width + mla.value_width), mla.kv_rank), 0)
    yield _weight("attn.o_proj", (width, heads * mla.value_width), 1)


def _mlp(name: str, width: int, mlp: int) -> Iterator[Parameter]:
    yield _weight(f"{name}.gate_proj", (mlp, width), 0)
    yield _weight(f"{name}.up_proj", (mlp, width), 0)
    yield _weight(f"{name}.down_proj", (width, mlp), 1)


def _moe(moe: MoeConfig, width: int) -> Iterator[Parameter]:
    yield _weight("mlp.router", (moe.experts, width))
    if moe.router == "sigmoid":
        yield Parameter("mlp.router.bias", (moe.experts,), 0, trained=False)
    yield from _mlp("mlp.shared", width, moe.shared_width)
    yield Parameter("mlp.experts.gate_proj", (moe.experts, moe.width, width), 0, 1, 0)
    yield Parameter("mlp.experts.up_proj", (moe.experts, moe.width, width), 0, 1, 0)
    yield Parameter("mlp.experts.down_proj", (moe.experts, width, moe.width), 0, 2, 0)
