"""Parameters and floating-point operations of a run, from its configuration alone.

Conventions. A multiplication and its addition are two FLOPs; only matrix products and convolutions count. Causal
attention in packs costs what it needs: a document of s tokens has s (s + 1) / 2 pairs of query and key. SAM's windowed
layers are counted on the padded grid, as the released code computes them. A token goes through the routed experts that
it is sent to, and through no other. The backward pass of a product is counted in its two halves, gradient of the input
and gradient of the weight, each where autograd needs it: nothing flows back into a part with nothing trainable before
it, and a frozen weight has no gradient. The backward pass of attention is four products, twice the forward; the scores
that flash kernels compute again are not counted.

What this implementation computes beyond that is `overhead`: see `Work`.
"""

from collections.abc import Callable
from dataclasses import dataclass

from megavl.config.model import DecoderConfig, MlaConfig, ModelConfig, MoeConfig, SamConfig, SiglipConfig
from megavl.config.parameters import parameters
from megavl.config.run import RunConfig


@dataclass(frozen=True)
class Work:
    """FLOPs of one item of the model list over a step, whatever the number of ranks that share them.

    `overhead` is what the method does not ask for but the implementation computes: blocks again in the backward pass,
    the channels beside each head in which SAM's attention carries relative positions, and the sums over packs that the
    auxiliary loss is made of, which are products too. `repeated` is the part of all
    this that every tensor rank computes for itself instead of sharing it with the others: vision, unless they share the
    tiles; and, without sequence parallelism, the latent of keys and values and the router's scores.
    """

    forward: int
    input_grad: int
    weight_grad: int
    overhead: int
    repeated: int

    @property
    def model(self) -> int:
        """What training needs."""
        return self.forward + self.input_grad + self.weight_grad

    @property
    def hardware(self) -> int:
        """What is computed, once."""
        return self.model + self.overhead

    def on_tensor_ranks(self, tensor: int) -> int:
        """What `tensor` ranks compute together."""
        return self.hardware + (tensor - 1) * self.repeated


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
    moe, active = model.decoder.moe, 0
    for parameter in parameters(model):
        if parameter.expert_dim is not None:
            active += parameter.size // moe.experts * moe.per_token
        elif parameter.name != "stem.embedding.weight":
            active += parameter.size
    return active


def item_work(config: RunConfig, *, tokens: int, squared_tokens: int, tiles: int) -> tuple[Work, ...]:
    """Work of each item of the model list over `tokens` tokens (those of images included) in documents whose squared
    lengths add up to `squared_tokens`, with `tiles` tiles among them (an image of DeepSeek-VL is one). What is frozen
    is read from the optimizer's rules, what is recomputed from `train.recompute`."""
    model, decoder = config.model, config.model.decoder

    def trains(name: str) -> bool:
        return config.optim.lr_multiplier(name) > 0

    stem = _Walk(trains)
    _stem(stem, model, tiles)
    if config.parallel.vision == "replicated":
        stem.repeat()
    works, live = [stem.work()], stem.live
    for index in range(decoder.layers):
        block = _Walk(trains, live)
        _block(block, index, config, tokens, (squared_tokens + tokens) // 2)
        if config.train.recompute == "full" and block.live:
            block.recompute()
        works.append(block.work())
        live = block.live
    head = _Walk(trains, live)
    head.add("head.norm.weight")
    head.linear(tokens, decoder.width, {"head.proj": decoder.vocab_size})
    return (*works, head.work())


def step_flops(config: RunConfig, *, tokens: int, squared_tokens: int, tiles: int) -> StepFlops:
    """FLOPs of one step of the whole global batch; the arguments are those of `item_work`."""
    works = item_work(config, tokens=tokens, squared_tokens=squared_tokens, tiles=tiles)
    return StepFlops(
        model=sum(work.model for work in works),
        hardware=sum(work.on_tensor_ranks(config.parallel.tensor) for work in works),
    )


class _Walk:
    """Follows activations from operation to operation and adds up what each costs.

    `live` says whether the activation at this point needs a gradient: whether anything before it is trainable.
    """

    def __init__(self, trains: Callable[[str], bool], live: bool = False):
        self.trains = trains
        self.live = live
        self.forward = self.input_grad = self.weight_grad = self.overhead = 0
        self.spare_forward = self.repeated = self.repeated_forward = 0
        self.last = 0

    def work(self) -> Work:
        return Work(self.forward, self.input_grad, self.weight_grad, self.overhead, self.repeated)

    def repeat(self) -> None:
        """Every tensor rank walks the whole path."""
        self.repeated, self.repeated_forward = self.work().hardware, self.forward + self.spare_forward

    def recompute(self) -> None:
        """The path is walked again in the backward pass, up to the last product: no gradient needs its result."""
        self.overhead += self.forward + self.spare_forward - self.last
        self.repeated += self.repeated_forward

    def add(self, *names: str) -> None:
        """Parameters that are added or scaled with: no product to count, but a gradient to start from."""
        self.live |= any(map(self.trains, names))

    def multiply(self, products: dict[str, int]) -> None:
        """Products of one activation with several parameters: name -> FLOPs."""
        trained = {name: self.trains(name) for name in products}
        self.last = sum(products.values())
        self.forward += self.last
        self.input_grad += self.last if self.live else 0
        self.weight_grad += sum(flops for name, flops in products.items() if trained[name])
        self.live |= any(trained.values())

    def linear(self, rows: int, d_in: int, outputs: dict[str, int], bias: bool = False) -> None:
        """Linear layers (or convolutions, with `rows` positions and `d_in` channels * kernel) on one input."""
        self.multiply({f"{name}.weight": 2 * rows * d_in * d_out for name, d_out in outputs.items()})
        if bias:
            self.add(*(f"{name}.bias" for name in outputs))

    def layer_norm(self, name: str) -> None:
        self.add(f"{name}.weight", f"{name}.bias")

    def attend(self, pairs: int, key_width: int, value_width: int, carried: int = 0) -> None:
        """Scores and weighted values over `pairs` of query and key, with so many channels of keys and of values in all
        heads: two products of activations, each with two gradients. `carried`: channels that ride along as overhead."""
        forward = 2 * pairs * (key_width + value_width)
        self.forward += forward
        self.input_grad += 2 * forward if self.live else 0
        self.spare(4 * pairs * carried, 8 * pairs * carried)

    def spare(self, forward: int, backward: int) -> None:
        """Overhead at this point."""
        self.spare_forward += forward
        self.overhead += forward + (backward if self.live else 0)

    def fork(self) -> "_Walk":
        return _Walk(self.trains, self.live)

    def join(self, other: "_Walk") -> None:
        self.live |= other.live
        self.forward += other.forward
        self.input_grad += other.input_grad
        self.weight_grad += other.weight_grad
        self.overhead += other.overhead
        self.spare_forward += other.spare_forward
        self.repeated += other.repeated
        self.repeated_forward += other.repeated_forward


def _stem(walk: _Walk, model: ModelConfig, tiles: int) -> None:
    rows, width = tiles * model.tile_features, model.decoder.width
    low = walk.fork()
    _siglip(low, model.siglip, tiles)
    if model.sam is None:
        square = 1 if model.tiling is None else model.tiling.shuffle**2
        low.linear(rows, model.siglip.width * square, {"stem.adaptor.fc1": width}, bias=True)
        low.linear(rows, width, {"stem.adaptor.fc2": width}, bias=True)
    else:
        low.linear(rows, model.siglip.width, {"stem.adaptor.low_up_proj": width // 2}, bias=True)
        high = walk.fork()
        _sam(high, model.sam, tiles, rows)
        high.linear(rows, model.sam.output_width, {"stem.adaptor.high_up_proj": width // 2}, bias=True)
        low.join(high)
        low.linear(rows, width, {"stem.adaptor.proj": width}, bias=True)
    if model.tiling is not None:
        low.add("stem.newline", "stem.separator")
    walk.add("stem.embedding.weight")
    walk.join(low)


def _siglip(walk: _Walk, siglip: SiglipConfig, tiles: int) -> None:
    tokens, width = siglip.grid**2, siglip.width
    rows = tiles * tokens
    walk.linear(rows, 3 * siglip.patch_size**2, {"stem.siglip.patch_embed": width}, bias=True)
    walk.add("stem.siglip.pos_embed")
    for index in range(siglip.layers):
        block = f"stem.siglip.blocks.{index}"
        walk.layer_norm(f"{block}.norm1")
        walk.linear(rows, width, {f"{block}.attn.qkv": 3 * width}, bias=True)
        walk.attend(tiles * tokens**2, width, width)
        walk.linear(rows, width, {f"{block}.attn.proj": width}, bias=True)
        walk.layer_norm(f"{block}.norm2")
        walk.linear(rows, width, {f"{block}.mlp.fc1": siglip.mlp_width}, bias=True)
        walk.linear(rows, siglip.mlp_width, {f"{block}.mlp.fc2": width}, bias=True)
    walk.layer_norm("stem.siglip.norm")


def _sam(walk: _Walk, sam: SamConfig, tiles: int, feature_rows: int) -> None:
    """SAM-B down to its `feature_rows` features: blocks, both necks, and the convolutions that both share."""
    rows, width = tiles * sam.grid**2, sam.width
    walk.linear(rows, 3 * sam.patch_size**2, {"stem.sam.patch_embed": width}, bias=True)
    walk.add("stem.sam.pos_embed")
    for index in range(sam.layers):
        _sam_block(walk, f"stem.sam.blocks.{index}", sam, tiles, sam.grid if index in sam.global_layers else sam.window)
        if index == sam.global_layers[0]:
            early = walk.fork()
    for path, neck in ((walk, "stem.sam.neck"), (early, "stem.sam.neck_hd")):
        path.linear(rows, width, {f"{neck}.0": sam.neck_width})
        path.layer_norm(f"{neck}.1")
        path.linear(rows, 9 * sam.neck_width, {f"{neck}.2": sam.neck_width})
        path.layer_norm(f"{neck}.3")
        # The map is resized to four times the side of the feature grid, and each convolution halves the side.
        path.linear(4 * feature_rows, 9 * sam.neck_width, {"stem.sam.downsamples.0": 2 * sam.neck_width})
        path.linear(feature_rows, 18 * sam.neck_width, {"stem.sam.downsamples.1": 4 * sam.neck_width})
    early.add("stem.sam.hd_alpha_downsamples")
    walk.join(early)


def _sam_block(walk: _Walk, block: str, sam: SamConfig, tiles: int, side: int) -> None:
    """One ViTDet block with attention within squares of `side`^2 patches, the grid padded to whole squares."""
    width, squares = sam.width, tiles * (-(-sam.grid // side)) ** 2
    rows, padded_rows = tiles * sam.grid**2, squares * side**2
    walk.layer_norm(f"{block}.norm1")
    walk.linear(padded_rows, width, {f"{block}.attn.qkv": 3 * width}, bias=True)
    # Each query is multiplied by `side` relative positions per direction, padded with zeros to a multiple of 8.
    positions, spare, live = [f"{block}.attn.rel_pos_{way}" for way in "hw"], -side % 8, walk.live
    walk.multiply(dict.fromkeys(positions, 2 * padded_rows * side * width))
    zeros = 2 * padded_rows * spare * width
    walk.spare(2 * zeros, (2 * live + sum(map(walk.trains, positions))) * zeros)
    walk.attend(squares * side**4, width, width, carried=sam.heads * 2 * (side + spare))
    walk.linear(padded_rows, width, {f"{block}.attn.proj": width}, bias=True)
    walk.layer_norm(f"{block}.norm2")
    walk.linear(rows, width, {f"{block}.mlp.lin1": sam.mlp_width}, bias=True)
    walk.linear(rows, sam.mlp_width, {f"{block}.mlp.lin2": width}, bias=True)


def _block(walk: _Walk, index: int, config: RunConfig, tokens: int, pairs: int) -> None:
    name, decoder = f"blocks.{index}", config.model.decoder
    walk.add(f"{name}.attn_norm.weight")
    if decoder.mla is None:
        _attention(walk, f"{name}.attn", decoder, tokens, pairs)
    else:
        _mla(walk, f"{name}.attn", decoder, decoder.mla, tokens, pairs, config.parallel.sequence)
    walk.add(f"{name}.mlp_norm.weight")
    if decoder.has_experts(index):
        _moe(walk, f"{name}.mlp", decoder.moe, config, tokens)
    else:
        _mlp(walk, f"{name}.mlp", decoder.width, decoder.mlp_width, tokens)


def _attention(walk: _Walk, name: str, decoder: DecoderConfig, tokens: int, pairs: int) -> None:
    width, kv_width = decoder.width, decoder.kv_heads * decoder.head_width
    walk.linear(tokens, width, {f"{name}.q_proj": width, f"{name}.k_proj": kv_width, f"{name}.v_proj": kv_width})
    walk.attend(pairs, width, width)
    walk.linear(tokens, width, {f"{name}.o_proj": width})


def _mla(
    walk: _Walk, name: str, decoder: DecoderConfig, mla: MlaConfig, tokens: int, pairs: int, sequence: bool
) -> None:
    width, heads = decoder.width, decoder.heads
    down, q = walk.fork(), walk.fork()
    down.linear(tokens, width, {f"{name}.kv_down_proj": mla.kv_rank + mla.rope_width})
    if not sequence:
        down.repeat()
    down.add(f"{name}.kv_norm.weight")
    down.linear(tokens, mla.kv_rank, {f"{name}.kv_up_proj": heads * (mla.nope_width + mla.value_width)})
    q.linear(tokens, width, {f"{name}.q_proj": heads * mla.key_width})
    walk.join(down)
    walk.join(q)
    walk.attend(pairs, heads * mla.key_width, heads * mla.value_width)
    walk.linear(tokens, heads * mla.value_width, {f"{name}.o_proj": width})


def _mlp(walk: _Walk, name: str, width: int, mlp_width: int, tokens: int) -> None:
    walk.linear(tokens, width, {f"{name}.gate_proj": mlp_width, f"{name}.up_proj": mlp_width})
    walk.linear(tokens, mlp_width, {f"{name}.down_proj": width})


def _moe(walk: _Walk, name: str, moe: MoeConfig, config: RunConfig, tokens: int) -> None:
    """Shared experts, and `per_token` routed ones for each token, none of which is dropped."""
    width, router, shared = config.model.decoder.width, walk.fork(), walk.fork()
    router.linear(tokens, width, {f"{name}.router": moe.experts})
    # How often each expert was chosen and its scores, summed over each pack of a micro-batch; the scores learn of it.
    sums = 2 * tokens * config.train.micro_batch * moe.experts
    router.spare(2 * sums, sums)
    if not config.parallel.sequence:
        router.repeat()
    _mlp(shared, f"{name}.shared", width, moe.shared_width, tokens)
    product = 2 * tokens * moe.per_token * width * moe.width
    walk.multiply({f"{name}.experts.gate_proj": product, f"{name}.experts.up_proj": product})
    walk.multiply({f"{name}.experts.down_proj": product})
    walk.last = 0  # what the experts give is kept, for the gradients of its weights
    walk.join(shared)
    walk.join(router)
