"""Every parameter of a model by name, from its shapes alone, and the dataflow that they form.

The names are those of the single process and of checkpoints. Source of the shapes: DeepSeek-VL section 3.1 and the
released `sam.py`, `siglip_vit.py` and `projector.py`; DeepSeek-VL2 Table 1 and the released `modeling_deepseek.py`.
"""

from dataclasses import dataclass

from megavl.config.dataflow import Attention, BalanceLoss, Block, Branches, Flow, Parameter, Product, parameters_of
from megavl.config.model import DecoderConfig, MlaConfig, ModelConfig, MoeConfig, SamConfig, SiglipConfig


def parameters(config: ModelConfig) -> tuple[Parameter, ...]:
    """All parameters, in the order of the model list and of its dataflow."""
    found = [parameter for flow in dataflow(config) for parameter in parameters_of(flow)]
    # The convolutions that SAM's necks share are listed once, after both.
    return tuple(reversed(dict.fromkeys(reversed(found))))


def parameters_of_encoder(config: ModelConfig) -> tuple[Parameter, ...]:
    """Parameters of the vision encoder: towers and adaptor. Every rank that encodes images has them whole."""
    encoder = "stem.siglip.", "stem.sam.", "stem.adaptor."
    return tuple(parameter for parameter in parameters(config) if parameter.name.startswith(encoder))


def dataflow(config: ModelConfig) -> tuple[Flow, ...]:
    """The flow of each item of the model list: stem, decoder blocks, head."""
    decoder = config.decoder
    blocks = (_block(_Path(f"blocks.{index}", index + 1), decoder, index) for index in range(decoder.layers))
    return _stem(_Path("stem", 0), config), *blocks, _head(_Path("head", decoder.layers + 1), decoder)


@dataclass(frozen=True)
class _Path:
    """Dotted path of a module within item `item` of the model list. `path / "norm"` is that of a module in it."""

    name: str
    item: int

    def __truediv__(self, name: str | int) -> "_Path":
        return _Path(f"{self.name}.{name}", self.item)

    def parameter(self, name: str, shape: tuple[int, ...], **properties) -> Parameter:
        """A parameter of this module; `properties` are those of `Parameter`."""
        return Parameter(f"{self.name}.{name}", shape, self.item, **properties)


# -- Stem. All of it but the embedding is whole on every rank.


def _stem(path: _Path, config: ModelConfig) -> Flow:
    decoder = config.decoder
    words = (path / "embedding").parameter("weight", (decoder.vocab_size, decoder.width), tensor_dim=0)
    marks = () if config.tiling is None else ("newline", "separator")
    return Branches((words, _encoder(path, config), *(path.parameter(name, (decoder.width,)) for name in marks)))


def _encoder(path: _Path, config: ModelConfig) -> Flow:
    """Towers and adaptor."""
    width, features, adaptor = config.decoder.width, config.tile_features, path / "adaptor"
    siglip = _siglip(path / "siglip", config.siglip)
    if config.sam is None:
        square = 1 if config.tiling is None else config.tiling.shuffle**2
        fc1 = _linear(adaptor / "fc1", config.siglip.width * square, width, features)
        return siglip, fc1, _linear(adaptor / "fc2", width, width, features)
    sam = _sam(path / "sam", config.sam, features)
    high = _linear(adaptor / "high_up_proj", config.sam.output_width, width // 2, features)
    low = _linear(adaptor / "low_up_proj", config.siglip.width, width // 2, features)
    return Branches(((siglip, low), (sam, high))), _linear(adaptor / "proj", width, width, features)


def _siglip(path: _Path, siglip: SiglipConfig) -> Flow:
    patches = siglip.grid**2
    return (
        _patch_embed(path / "patch_embed", siglip.width, siglip.patch_size, patches),
        path.parameter("pos_embed", (1, patches, siglip.width)),
        *(_siglip_block(path / "blocks" / index, siglip, patches) for index in range(siglip.layers)),
        _layer_norm(path / "norm", siglip.width),
    )


def _siglip_block(path: _Path, siglip: SiglipConfig, patches: int) -> Flow:
    width = siglip.width
    return Block(
        "tower",
        (
            _layer_norm(path / "norm1", width),
            _linear(path / "attn.qkv", width, 3 * width, patches),
            Attention(width, width, pairs_per_tile=patches**2),
            _linear(path / "attn.proj", width, width, patches),
            _layer_norm(path / "norm2", width),
            _linear(path / "mlp.fc1", width, siglip.mlp_width, patches),
            _linear(path / "mlp.fc2", siglip.mlp_width, width, patches),
        ),
    )


def _sam(path: _Path, sam: SamConfig, features: int) -> Flow:
    """Blocks, both necks, and the convolutions that both share."""
    patches, neck = sam.grid**2, sam.neck_width
    embedding = (
        _patch_embed(path / "patch_embed", sam.width, sam.patch_size, patches),
        path.parameter("pos_embed", (1, sam.grid, sam.grid, sam.width)),
    )
    blocks = [_sam_block(path / "blocks" / index, sam, index) for index in range(sam.layers)]
    # A map is resized to four times the side of the features' grid, and each convolution halves the side.
    downsamples = (
        _convolution(path / "downsamples.0", neck, 2 * neck, 3, 4 * features),
        _convolution(path / "downsamples.1", 2 * neck, 4 * neck, 3, features),
    )
    split = sam.first_global + 1
    main = (*blocks[split:], _neck(path / "neck", sam), downsamples)
    detail = (_neck(path / "neck_hd", sam), downsamples, path.parameter("hd_alpha_downsamples", (1,)))
    return *embedding, *blocks[:split], Branches((main, detail))


def _sam_block(path: _Path, sam: SamConfig, index: int) -> Flow:
    """A ViTDet block; attention is within squares of `side`^2 patches, the grid padded to whole squares."""
    width, patches, attention = sam.width, sam.grid**2, path / "attn"
    side = sam.grid if index in sam.global_layers else sam.window
    squares = (-(-sam.grid // side)) ** 2
    padded = squares * side**2
    # A query meets the positions of one row or one column: `side` of the table's.
    head_width = width // sam.heads
    met = Product(padded * sam.heads, "tile", head_width, side)
    positions = (
        attention.parameter(name, (2 * side - 1, head_width), product=met) for name in ("rel_pos_h", "rel_pos_w")
    )
    return Block(
        "tower",
        (
            _layer_norm(path / "norm1", width),
            _linear(attention / "qkv", width, 3 * width, padded),
            Attention(width, width, squares * side**4, tuple(positions)),
            _linear(attention / "proj", width, width, padded),
            _layer_norm(path / "norm2", width),
            _linear(path / "mlp.lin1", width, sam.mlp_width, patches),
            _linear(path / "mlp.lin2", sam.mlp_width, width, patches),
        ),
    )


def _neck(path: _Path, sam: SamConfig) -> Flow:
    patches, neck = sam.grid**2, sam.neck_width
    return (
        _convolution(path / 0, sam.width, neck, 1, patches),
        _layer_norm(path / 1, neck),
        _convolution(path / 2, neck, neck, 3, patches),
        _layer_norm(path / 3, neck),
    )


def _patch_embed(path: _Path, width: int, patch_size: int, patches: int) -> Flow:
    return _convolution(path, 3, width, patch_size, patches), path.parameter("bias", (width,))


def _linear(path: _Path, d_in: int, d_out: int, rows: int) -> Flow:
    """A linear layer with bias on `rows` rows of each tile."""
    product = Product(rows, "tile", d_in, d_out)
    return path.parameter("weight", (d_out, d_in), product=product), path.parameter("bias", (d_out,))


def _convolution(path: _Path, d_in: int, d_out: int, kernel: int, positions: int) -> Parameter:
    """A convolution with a square kernel, giving `positions` positions of each tile."""
    product = Product(positions, "tile", d_in * kernel**2, d_out)
    return path.parameter("weight", (d_out, d_in, kernel, kernel), product=product)


def _layer_norm(path: _Path, width: int) -> Flow:
    return path.parameter("weight", (width,)), path.parameter("bias", (width,))


# -- Decoder


def _head(path: _Path, decoder: DecoderConfig) -> Flow:
    product = Product(1, "label", decoder.width, decoder.vocab_size)
    proj = (path / "proj").parameter("weight", (decoder.vocab_size, decoder.width), tensor_dim=0, product=product)
    return _norm(path / "norm", decoder.width), proj


def _block(path: _Path, decoder: DecoderConfig, layer: int) -> Flow:
    attention, mlp = path / "attn", path / "mlp"
    return Block(
        "decoder",
        (
            _norm(path / "attn_norm", decoder.width),
            _attention(attention, decoder) if decoder.mla is None else _mla(attention, decoder, decoder.mla),
            _norm(path / "mlp_norm", decoder.width),
            _feed_forward(mlp, decoder, layer),
        ),
    )


def _attention(path: _Path, decoder: DecoderConfig) -> Flow:
    width, kv_width = decoder.width, decoder.kv_heads * decoder.head_width
    q = _column_linear(path / "q_proj", width, width)
    k, v = _column_linear(path / "k_proj", width, kv_width), _column_linear(path / "v_proj", width, kv_width)
    return Branches((q, k, v)), Attention(width, width), _row_linear(path / "o_proj", width, width)


def _mla(path: _Path, decoder: DecoderConfig, mla: MlaConfig) -> Flow:
    width, heads = decoder.width, decoder.heads
    q = _column_linear(path / "q_proj", width, heads * mla.key_width)
    kv = (
        _shared_linear(path / "kv_down_proj", width, mla.kv_rank + mla.rope_width),
        _norm(path / "kv_norm", mla.kv_rank),
        _column_linear(path / "kv_up_proj", mla.kv_rank, heads * (mla.nope_width + mla.value_width)),
    )
    return (
        Branches((q, kv)),
        Attention(heads * mla.key_width, heads * mla.value_width),
        _row_linear(path / "o_proj", heads * mla.value_width, width),
    )


def _feed_forward(path: _Path, decoder: DecoderConfig, layer: int) -> Flow:
    if decoder.has_experts(layer):
        return _moe(path, decoder.moe, decoder.width)
    return _mlp(path, decoder.width, decoder.mlp_width)


def _mlp(path: _Path, width: int, hidden: int) -> Flow:
    gate, up = _column_linear(path / "gate_proj", width, hidden), _column_linear(path / "up_proj", width, hidden)
    return Branches((gate, up)), _row_linear(path / "down_proj", hidden, width)


def _moe(path: _Path, moe: MoeConfig, width: int) -> Flow:
    router = (_shared_linear(path / "router", width, moe.experts), BalanceLoss(moe.experts))
    if moe.router == "sigmoid":
        router = *router, (path / "router").parameter("bias", (moe.experts,), trained=False)
    experts = path / "experts"
    gate = _expert_linears(experts, "gate_proj", moe, width, moe.width, 1)
    up = _expert_linears(experts, "up_proj", moe, width, moe.width, 1)
    down = _expert_linears(experts, "down_proj", moe, moe.width, width, 2)
    routed = (Branches((gate, up)), down)
    return Branches((router, _mlp(path / "shared", width, moe.shared_width), routed))


def _column_linear(path: _Path, d_in: int, d_out: int) -> Parameter:
    return _weight(path, d_in, d_out, 0)


def _row_linear(path: _Path, d_in: int, d_out: int) -> Parameter:
    return _weight(path, d_in, d_out, 1)


def _shared_linear(path: _Path, d_in: int, d_out: int) -> Parameter:
    return _weight(path, d_in, d_out, None)


def _weight(path: _Path, d_in: int, d_out: int, tensor_dim: int | None) -> Parameter:
    """A linear layer without bias on every token."""
    return path.parameter("weight", (d_out, d_in), tensor_dim=tensor_dim, product=Product(1, "token", d_in, d_out))


def _expert_linears(path: _Path, name: str, moe: MoeConfig, d_in: int, d_out: int, tensor_dim: int) -> Parameter:
    """A stack of one linear layer for each routed expert; a token meets `per_token` of them."""
    product = Product(moe.per_token, "token", d_in, d_out)
    return path.parameter(name, (moe.experts, d_out, d_in), tensor_dim=tensor_dim, expert_dim=0, product=product)


def _norm(path: _Path, width: int) -> Parameter:
    return path.parameter("weight", (width,))
