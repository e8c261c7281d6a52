"""Decoder blocks and head as a list of operations, as `megavl.model` composes them."""

from dataclasses import dataclass

from megavl.config.model import MlaConfig, MoeConfig
from megavl.plan.message import Message
from megavl.plan.operators import FP32_BYTES, INDEX_BYTES, Recorder
from megavl.plan.tape import Activation, Storage

# Most bytes of logits in memory (`megavl.parallel.cross_entropy`).
LOGITS_BYTES = 2**28
# What the fused attention kernels serve (`megavl.ops.attention`).
_HEAD_WIDTH_MULTIPLE, _MAX_HEAD_WIDTH = 8, 256


@dataclass(frozen=True)
class _ExpertWeight:
    """A stack of weights, one for each expert of this rank.

    copies:    views of it that require a gradient; empty where it is read itself
    gradients: bytes of its gradient; empty where it is not trained, or read through a copy
    """

    copies: list[Activation]
    gradients: list[int]


@dataclass
class DecoderRecorder(Recorder):
    """Blocks and head on one rank.

    labels: supervised tokens of the micro-batch
    """

    labels: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.decoder = self.config.model.decoder
        width = self.decoder.head_width if self.decoder.mla is None else self.decoder.mla.rope_width
        # Cosine and sine of every position, which all blocks of a stage share.
        self.tables = Storage(self.tokens * width * FP32_BYTES, None)

    def block(self, h: Activation, layer: int) -> Activation:
        """[T, D] -> [T, D], or [T / tp, D] of both under sequence parallelism."""
        if self.config.train.recompute == "block":
            return self.recomputed(h, lambda h: self._block(h, layer), self.tables)
        self.selective = self.config.train.recompute == "selective"
        out = self._block(h, layer)
        self.selective = False
        return out

    def _block(self, h: Activation, layer: int) -> Activation:
        path, width = f"blocks.{layer}", self.decoder.width
        x = self.rms_norm(h, f"{path}.attn_norm.weight", self.stream, width)
        attend = self._attention if self.decoder.mla is None else self._latent_attention
        h, x = self.add_rms_norm(h, attend(x, f"{path}.attn"), f"{path}.mlp_norm.weight", width)
        if self.decoder.has_experts(layer):
            return self.add(h, self._moe(x, f"{path}.mlp", self.decoder.moe))
        return self.add(h, self._mlp(x, f"{path}.mlp", self.decoder.mlp_width))

    # -- Attention

    def _attention(self, x: Activation, path: str) -> Activation:
        decoder, width = self.decoder, self.decoder.width
        head_width, kv_width = decoder.head_width, decoder.kv_heads * decoder.head_width
        widths = {"q_proj": width, "k_proj": kv_width, "v_proj": kv_width}
        q, k, v = self.column_linears(x, path, widths, width)
        q, k = self.tape.apply([q, k], [q.bytes, k.bytes], saves=[self.tables])
        if self.selective and v.storage.bytes > v.bytes:
            (v,) = self.tape.apply([v], [v.bytes])  # else the columns would keep all of the joint product
        attended = self._attend(q, k, v, head_width, head_width)
        return self._row_linear(attended, f"{path}.o_proj.weight", width, width)

    def _latent_attention(self, x: Activation, path: str) -> Activation:
        decoder, mla, tokens, width = self.decoder, self.decoder.mla, self.tokens, self.decoder.width
        heads = decoder.heads // self.tensor
        latent, k_rope = self._latent(x, path, mla)
        entered, k_rope = self._enter_with(latent, k_rope, mla)
        kv_width = heads * (mla.nope_width + mla.value_width)
        kv = self.linear(entered, f"{path}.kv_up_proj.weight", tokens, mla.kv_rank, kv_width)
        (q,) = self.column_linears(x, path, {"q_proj": decoder.heads * mla.key_width}, width)
        values = Activation(kv.storage, self.size(tokens, heads * mla.value_width), kv.live)
        q, k, v = self.tape.apply([q, kv, k_rope], [q.bytes, q.bytes, values], saves=[self.tables])
        attended = self._attend(q, k, v, mla.key_width, mla.value_width)
        return self._row_linear(attended, f"{path}.o_proj.weight", decoder.heads * mla.value_width, width)

    def _latent(self, x: Activation, path: str, mla: MlaConfig) -> tuple[Activation, Activation]:
        """The normalised latent and the positioned channels of the keys, of this rank's own tokens."""
        down = mla.kv_rank + mla.rope_width
        weights, replies = self.shared_weight(f"{path}.kv_down_proj.weight", self.decoder.width * down)
        (both,) = self.tape.apply(
            [x], [self.size(self.stream, down)], saves=[x] if weights else [], weights=weights, replies=replies
        )
        latent = Activation(both.storage, self.size(self.stream, mla.kv_rank), both.live)
        k_rope = Activation(both.storage, self.size(self.stream, mla.rope_width), both.live)
        latent, k_rope = self.tape.apply([both], [latent, k_rope])
        return self.rms_norm(latent, f"{path}.kv_norm.weight", self.stream, mla.kv_rank), k_rope

    def _enter_with(self, latent: Activation, k_rope: Activation, mla: MlaConfig) -> tuple[Activation, Activation]:
        """Latent and positioned channels enter the parallel region by one collective. What is gathered is one tensor;
        selective recomputation gathers the latent alone again."""
        rank, width = mla.kv_rank, mla.kv_rank + mla.rope_width
        whole = self.size(self.tokens, width)
        if self.tensor == 1:
            return latent, k_rope
        if not self.sequence:
            return self.tape.apply([latent, k_rope], [latent, k_rope], replies=self.message("all_reduce", whole))
        (both,) = self.tape.apply([latent, k_rope], [self.size(self.stream, width)])
        sends, replies = self.message("all_gather", whole), self.message("reduce_scatter", whole)
        (both,) = self.tape.apply([both], [whole], sends=sends, replies=replies)
        if not (self.selective and both.live):
            return both, both
        again = Storage(self.size(self.tokens, rank), self.tape.item, (latent.storage,))
        again.messages = tuple(self.message("all_gather", again.bytes))
        return Activation(again, again.bytes, True), both

    def _attend(self, q: Activation, k: Activation, v: Activation, key_width: int, value_width: int) -> Activation:
        """It keeps queries, keys, values, its result and the log-sum-exp of each row. Fused kernels have one width, to
        which the columns in front of narrower values belong; the reference fills them up, and joins the documents."""
        tokens, heads = self.tokens, self.decoder.heads // self.tensor
        fused = self.element == 2 and not key_width % _HEAD_WIDTH_MULTIPLE and key_width <= _MAX_HEAD_WIDTH
        narrow = value_width < key_width
        if narrow and not fused:
            (v,) = self.tape.apply([v], [k.bytes])
        (out,) = self.tape.apply([q, k, v], [q.bytes], saves=[q, k, v, tokens * heads * FP32_BYTES], saves_outputs=True)
        if narrow or not fused:
            (out,) = self.tape.apply([out], [self.size(tokens, heads * value_width)])
        return out

    def _row_linear(self, x: Activation, name: str, d_in: int, d_out: int) -> Activation:
        return self.leave(self.linear(x, name, self.tokens, d_in // self.tensor, d_out), d_out)

    # -- Feed-forward

    def _mlp(self, x: Activation, path: str, hidden: int) -> Activation:
        width = self.decoder.width
        gate_up = self.column_linears(x, path, {"gate_proj": hidden, "up_proj": hidden}, width)
        product = self.swiglu(gate_up, self.tokens, hidden // self.tensor)
        return self._row_linear(product, f"{path}.down_proj.weight", hidden, width)

    def _moe(self, x: Activation, path: str, moe: MoeConfig) -> Activation:
        cut = self.config.parallel.expert_width == "cut" and self.tensor > 1
        weights, experts = self._route(x, f"{path}.router", moe)
        h, weights, rows = self._enter_experts(x, weights, moe, cut)
        places = Storage(rows * INDEX_BYTES, self.tape.item)
        exchange = self._exchange(rows)
        # The rank tells the others how many rows each of its experts gets.
        self.tape.apply([], [], sends=self.message("all_to_all", moe.experts * INDEX_BYTES, "expert"))
        (sent,) = self.tape.apply([h], [self.size(rows, self.decoder.width)], saves=[places])
        self.derive(sent, h, places, Storage(rows * INDEX_BYTES, self.tape.item))
        if exchange:
            (sent,) = self.tape.apply([sent], [sent.bytes], sends=exchange, replies=exchange)
        shared = self._mlp(x, f"{path}.shared", moe.shared_width)
        if exchange:
            (sent,) = self.tape.apply([sent], [sent.bytes], saves=[rows * INDEX_BYTES])
        results = self._experts(sent, f"{path}.experts", rows, moe, cut)
        if exchange:
            (results,) = self.tape.apply([results], [results.bytes], saves=[rows * INDEX_BYTES])
            (results,) = self.tape.apply([results], [results.bytes], sends=exchange, replies=exchange)
        routed_size = self.size(rows // moe.per_token, self.decoder.width)
        (routed,) = self.tape.apply([results, weights], [routed_size], saves=[results, weights, places])
        return self.add(shared, self._leave_experts(routed, cut))

    def _exchange(self, rows: int) -> list[Message]:
        """Rows on their way to the ranks of their experts, or back."""
        return self.message("all_to_all", self.size(rows, self.decoder.width), "expert")

    def _route(self, x: Activation, path: str, moe: MoeConfig) -> tuple[Activation, Storage]:
        """Weights of each token's experts, and their indices."""
        rows, packs, scores_size = self.stream, self.config.train.micro_batch, self.stream * moe.experts * FP32_BYTES
        chosen_size = rows * moe.per_token * FP32_BYTES
        experts = Storage(rows * moe.per_token * INDEX_BYTES, self.tape.item)
        weights, replies = self.shared_weight(f"{path}.weight", self.decoder.width * moe.experts)
        saves = [x] if weights or self.element == 2 else []  # the kernel for bf16 keeps it in any case
        (logits,) = self.tape.apply([x], [scores_size], saves=saves, weights=weights, replies=replies)
        (scores,) = self.tape.apply([logits], [scores_size], saves_outputs=True)
        (chosen,) = self.tape.apply([scores], [chosen_size], saves=[experts])
        if moe.normalise:
            (chosen,) = self.tape.apply([chosen], [chosen_size], saves=[chosen, rows * FP32_BYTES])
        shares = scores
        if moe.router == "sigmoid":
            (shares,) = self.tape.apply([scores], [scores_size], saves=[scores, rows * FP32_BYTES])
        # Sums over each pack, by a product with the packs' members.
        sums = self.message("all_reduce", 2 * packs * moe.experts * FP32_BYTES) if self.sequence else []
        (auxiliary,) = self.tape.apply(
            [shares], [packs * moe.experts * FP32_BYTES], saves=[packs * rows * FP32_BYTES], sends=sums
        )
        (chosen,) = self.tape.apply([chosen, auxiliary], [chosen_size], saves=[moe.experts * INDEX_BYTES])
        return chosen, experts

    def _enter_experts(
        self, x: Activation, weights: Activation, moe: MoeConfig, cut: bool
    ) -> tuple[Activation, Activation, int]:
        """Tokens that this rank sends to experts, their weights, and the rows of all their choices."""
        width, k = self.decoder.width, moe.per_token
        if self.tensor == 1:
            return x, weights, self.tokens * k
        if cut:
            if self.sequence:
                self.tape.apply([], [], sends=self.message("all_gather", self.tokens * k * INDEX_BYTES))
            return self.enter(x, width), self.enter(weights, k, FP32_BYTES), self.tokens * k
        if self.sequence:
            return x, weights, self.stream * k
        # A slice of the rows is a view.
        parts = []
        for whole, size in ((x, self.size(self.tokens, width)), (weights, self.tokens * k * FP32_BYTES)):
            part = Activation(whole.storage, size // self.tensor, whole.live)
            parts += self.tape.apply([whole], [part], replies=self.message("all_gather", size))
        return *parts, self.tokens // self.tensor * k

    def _leave_experts(self, routed: Activation, cut: bool) -> Activation:
        width = self.decoder.width
        if cut:
            return self.leave(routed, width)
        if self.sequence or self.tensor == 1:
            return routed
        whole = self.size(self.tokens, width)
        (out,) = self.tape.apply([routed], [whole], sends=self.message("all_gather", whole))
        return out

    def _experts(self, x: Activation, path: str, rows: int, moe: MoeConfig, cut: bool) -> Activation:
        """SwiGLU layers of the experts of this rank on `rows` rows."""
        width, hidden = self.decoder.width, moe.width // self.tensor if cut else moe.width
        elements = moe.experts // self.config.parallel.expert * width * hidden

        names = ("gate_proj", "up_proj", "down_proj")
        gate, up, down = (self._expert_weight(f"{path}.{name}", elements, cut) for name in names)
        if self.config.ops.expert_mlp == "triton" and self.element == 2:
            # One node: the backward pass computes the activations, and their gradients and gate's and up's, besides.
            within = 3 * self.size(rows, hidden)
            (out,) = self.tape.apply(
                [x, *gate.copies, *up.copies, *down.copies],
                [self.size(rows, width)],
                saves=[x, 2 * self.size(rows, hidden)],
                weights=[*gate.gradients, *up.gradients, *down.gradients] + [within] * x.live,
            )
            return out

        def product(x: Activation, weight: _ExpertWeight, d_out: int) -> Activation:
            # It keeps its input, whether or not its weight is trained.
            (out,) = self.tape.apply([x, *weight.copies], [self.size(rows, d_out)], saves=[x], weights=weight.gradients)
            return out

        gate, up = product(x, gate, hidden), product(x, up, hidden)
        activated = self.swiglu([gate, up], rows, hidden)
        return product(activated, down, width)

    def _expert_weight(self, name: str, elements: int, cut: bool) -> _ExpertWeight:
        """Whole weights on several tensor ranks are copied, so that the backward pass adds up their gradients."""
        gradients = self.weights((name, elements))
        if cut or self.tensor == 1:
            return _ExpertWeight([], gradients)
        copies = []
        for size in gradients:
            view = Activation(Storage(0, self.tape.item), size, True)
            copies += self.tape.apply([], [view], weights=[size], replies=self.message("all_reduce", size))
        return _ExpertWeight(copies, [])

    # -- Head

    def head(self, h: Activation) -> Activation:
        """Norm of all tokens, product and loss of the supervised ones. The gradients are computed in the forward pass,
        and are all that is kept: of the tokens, and of this rank's rows of the weight."""
        decoder, width = self.decoder, self.decoder.width
        vocab, selected = decoder.vocab_size // self.tensor, self.size(self.labels, width)
        x = self.rms_norm(h, "head.norm.weight", self.stream, width)
        if self.sequence:
            x = self.enter(x, width)
        (x,) = self.tape.apply([x], [selected])
        if not self.sequence and self.tensor > 1:
            (x,) = self.tape.apply([x], [x], replies=self.message("all_reduce", selected))
        weights = self.weights(("head.proj.weight", vocab * width))
        gradients = [selected] * x.live + weights
        # Logits of one chunk of rows; the gradients of the rows are joined at the end.
        chunks = -(-self.size(self.labels, vocab) // LOGITS_BYTES) or 1
        logits = self.size(-(-self.labels // chunks), vocab) + selected * x.live
        # The maximum, then the sum and the logit of the label of each token.
        statistics = [
            message
            for rows in _parts(self.labels, chunks)
            for size in (rows * FP32_BYTES, 2 * rows * FP32_BYTES)
            for message in self.message("all_reduce", size)
        ]
        (loss,) = self.tape.apply(
            [x],
            [FP32_BYTES],
            saves=gradients,
            weights=weights,
            prepared=True,
            temporary=logits,
            sends=statistics,
        )
        return loss


def _parts(rows: int, count: int) -> list[int]:
    """Sizes of `count` parts, which differ by one at most."""
    return [rows // count + (index < rows % count) for index in range(count)]
