"""The stem as a list of operations: token embedding, towers, adaptor and splice, as `megavl.model` composes them."""

from collections.abc import Callable
from dataclasses import dataclass

from megavl.config.model import SamConfig, SiglipConfig
from megavl.config.parameters import parameters_of_encoder
from megavl.plan.operators import FP32_BYTES, INDEX_BYTES, Recorder
from megavl.plan.tape import Activation, Storage


@dataclass
class StemRecorder(Recorder):
    """The stem on one rank.

    tiles: of the micro-batch; 0 in a text step, in which the towers do not run
    """

    tiles: int = 0

    def stem(self) -> Activation:
        """Hidden states [T, D], or under sequence parallelism a view [T / tp, D] of them."""
        features = self._features() if self.tiles else None
        words = self._embedding()
        if features is not None:
            marks = [] if self.config.model.tiling is None else ["newline", "separator"]
            weights = self.weights(*((f"stem.{mark}", self.config.model.decoder.width) for mark in marks))
            (words,) = self.tape.apply([words, features], [words.bytes], weights=weights)
        if not self.sequence:
            return words
        part = Activation(words.storage, words.bytes // self.tensor, words.live)
        (part,) = self.tape.apply([words], [part], replies=self.message("all_gather", words.bytes))
        return part

    def _embedding(self) -> Activation:
        decoder, tokens = self.config.model.decoder, self.tokens
        elements, size = decoder.vocab_size // self.tensor * decoder.width, self.size(tokens, decoder.width)
        # The tokens of a batch are its own; those with placeholders, or with tokens of other ranks, replaced are new.
        indices = [tokens * INDEX_BYTES] if self.tiles or self.tensor > 1 else []
        (words,) = self.tape.apply([], [size], saves=indices, weights=self.weights(("stem.embedding.weight", elements)))
        if self.tensor > 1:
            (words,) = self.tape.apply([words], [size], saves=[tokens])  # which are those of other ranks: a byte each
            (words,) = self.tape.apply([words], [size], sends=self.message("all_reduce", size))
        return words

    # -- Encoder

    def _features(self) -> Activation:
        """Features of all tiles. Where they are encoded before the passes, they are no memory of this micro-batch."""
        if not self.config.parallel.encodes_ahead:
            return self._encode()
        size = self.size(self.tiles * self.config.model.tile_features, self.config.model.decoder.width)
        return Activation(Storage(size, None), size, bool(self._trained_weights()))

    def encode_ahead(self) -> Activation:
        """Features [tiles, tile_features, D] of tiles that this rank encodes before the passes."""
        self.tiles_here = self.tiles
        return self._adapt()

    def _encode(self) -> Activation:
        """Features [tiles, tile_features, D] of all tiles, which are encoded here or on all tensor ranks together."""
        shares = self.config.parallel.vision == "sharded" and self.tensor > 1
        self.tiles_here = -(-self.tiles // self.tensor) if shares else self.tiles
        sent = [message for size in self._trained_weights() for message in self.message("all_reduce", size)]
        self.tape.apply([], [], weights=[0] if sent and shares else [], replies=sent if shares else [])
        features = self._adapt()
        if shares:
            gathered = features.bytes * self.tensor
            (features,) = self.tape.apply([features], [gathered], sends=self.message("all_gather", gathered))
        return features

    def _trained_weights(self) -> list[int]:
        return self.weights(*((each.name, each.size) for each in parameters_of_encoder(self.config.model)))

    def _adapt(self) -> Activation:
        """Towers and adaptor: [tiles, tile_features, D]."""
        model, width = self.config.model, self.config.model.decoder.width
        rows, path = self.tiles_here * model.tile_features, "stem.adaptor"
        siglip = self._siglip(model.siglip)
        if model.sam is not None:
            high = self._linear(self._sam(model.sam), f"{path}.high_up_proj", rows, model.sam.output_width, width // 2)
            low = self._linear(siglip, f"{path}.low_up_proj", rows, model.siglip.width, width // 2)
            (both,) = self.tape.apply([high, low], [self.size(rows, width)])
            return self._linear(self._gelu(both), f"{path}.proj", rows, width, width)
        channels = model.siglip.width
        if model.tiling is not None:  # the patches of a square side by side: a copy
            channels *= model.tiling.shuffle**2
            (siglip,) = self.tape.apply([siglip], [self.size(rows, channels)])
        hidden = self._linear(siglip, f"{path}.fc1", rows, channels, width)
        return self._linear(self._gelu(hidden), f"{path}.fc2", rows, width, width)

    def _siglip(self, siglip: SiglipConfig) -> Activation:
        path, rows, width = "stem.siglip", self.tiles_here * siglip.grid**2, siglip.width
        x = self._patches(path, siglip.image_size, siglip.patch_size, siglip.grid, width)
        for index in range(siglip.layers):
            x = self._tower_block(x, lambda x, block=f"{path}.blocks.{index}": self._siglip_block(x, block, siglip))
        return self._layer_norm(x, f"{path}.norm", rows, width)

    def _siglip_block(self, x: Activation, path: str, siglip: SiglipConfig) -> Activation:
        rows, width = self.tiles_here * siglip.grid**2, siglip.width
        qkv = self._linear(
            self._layer_norm(x, f"{path}.norm1", rows, width), f"{path}.attn.qkv", rows, width, 3 * width
        )
        statistics = rows * siglip.heads * FP32_BYTES
        (attended,) = self.tape.apply([qkv], [self.size(rows, width)], saves=[qkv, statistics], saves_outputs=True)
        x = self.add(x, self._linear(attended, f"{path}.attn.proj", rows, width, width))
        return self._tower_mlp(x, path, ("mlp.fc1", "mlp.fc2"), rows, width, siglip.mlp_width)

    def _sam(self, sam: SamConfig) -> Activation:
        """Both maps at the grid of SigLIP's features: [tiles, features, output_width]."""
        path, patches = "stem.sam", self.tiles_here * sam.grid**2
        x = self._patches(path, sam.image_size, sam.patch_size, sam.grid, sam.width)
        for index in range(sam.layers):
            side = sam.grid if index in sam.global_layers else sam.window
            block = f"{path}.blocks.{index}"
            x = self._tower_block(x, lambda x, block=block, side=side: self._sam_block(x, block, sam, side))
            if index == sam.first_global:
                detail = x
        main = self._bring_down(self._neck(x, f"{path}.neck", sam, patches), path, sam)
        detail = self._bring_down(self._neck(detail, f"{path}.neck_hd", sam, patches), path, sam)
        weights = self.weights((f"{path}.hd_alpha_downsamples", 1))
        (detail,) = self.tape.apply([detail], [detail.bytes], saves=[detail] if weights else [], weights=weights)
        # The adaptor's product takes a copy whose channels are side by side.
        (features,) = self.tape.apply([self.add(main, detail)], [detail.bytes])
        return features

    def _sam_block(self, x: Activation, path: str, sam: SamConfig, side: int) -> Activation:
        """Attention within squares of `side`^2 patches, whose relative positions are channels of queries and keys."""
        width, patches, attention = sam.width, self.tiles_here * sam.grid**2, f"{path}.attn"
        squares = (-(-sam.grid // side)) ** 2
        rows, head_width, spaced = self.tiles_here * squares * side**2, sam.width // sam.heads, side + -side % 8
        (squared,) = self.tape.apply([self._layer_norm(x, f"{path}.norm1", patches, width)], [self.size(rows, width)])
        qkv = self._linear(squared, f"{attention}.qkv", rows, width, 3 * width)
        carried = sam.heads * 2 * spaced
        scores = self._relative_scores(qkv, attention, rows, side, head_width, spaced, sam)
        wide = self.size(rows, width + carried)
        q, k, v = self.tape.apply([qkv, scores], [wide] * 3)
        saves = [q, k, v, rows * sam.heads * FP32_BYTES]
        (attended,) = self.tape.apply([q, k, v], [wide], saves=saves, saves_outputs=True)
        (attended,) = self.tape.apply([attended], [self.size(rows, width)])
        out = self._linear(attended, f"{attention}.proj", rows, width, width)
        (out,) = self.tape.apply([out], [self.size(patches, width)])
        x = self.add(x, out)
        return self._tower_mlp(x, path, ("mlp.lin1", "mlp.lin2"), patches, width, sam.mlp_width)

    def _relative_scores(
        self, qkv: Activation, path: str, rows: int, side: int, head_width: int, spaced: int, sam: SamConfig
    ) -> Activation:
        """Two products of the queries, with the positions of all rows and with those of all columns. Each product keeps
        a copy of the queries and its table."""
        parts = []
        for name in ("rel_pos_h", "rel_pos_w"):
            weights = self.weights((f"{path}.{name}", (2 * side - 1) * head_width))
            queries = [self.size(rows, sam.width)] if weights else []
            table = [self.size(side * spaced, head_width)] if qkv.live else []
            indices = [side * side * INDEX_BYTES] if weights else []
            parts += self.tape.apply(
                [qkv],
                [self.size(rows, sam.heads * spaced)],
                saves=[*queries, *table, *indices],
                weights=weights,
            )
        (scores,) = self.tape.apply(parts, [sum(part.bytes for part in parts)])
        return scores

    # -- Layers of the towers; all rows are patches of the tiles that are encoded here

    def _tower_block(self, x: Activation, block: Callable[[Activation], Activation]) -> Activation:
        return self.recomputed(x, block) if self.config.train.recompute_towers else block(x)

    def _tower_mlp(
        self, x: Activation, path: str, names: tuple[str, str], rows: int, width: int, hidden: int
    ) -> Activation:
        first, second = (f"{path}.{name}" for name in names)
        inner = self._linear(self._layer_norm(x, f"{path}.norm2", rows, width), first, rows, width, hidden)
        return self.add(x, self._linear(self._gelu(inner), second, rows, hidden, width))

    def _linear(self, x: Activation, path: str, rows: int, d_in: int, d_out: int) -> Activation:
        """With a bias."""
        weight = self.weights((f"{path}.weight", d_in * d_out))
        bias = self.weights((f"{path}.bias", d_out))
        (out,) = self.tape.apply([x], [self.size(rows, d_out)], saves=[x] if weight else [], weights=weight + bias)
        return out

    def _gelu(self, x: Activation) -> Activation:
        (out,) = self.tape.apply([x], [x.bytes], saves=[x])
        return out

    def _layer_norm(self, x: Activation, path: str, rows: int, width: int) -> Activation:
        """It keeps its input, and mean and deviation of each row."""
        weights = self.weights((f"{path}.weight", width), (f"{path}.bias", width))
        (out,) = self.tape.apply([x], [self.size(rows, width)], saves=[x, 2 * rows * FP32_BYTES], weights=weights)
        return out

    def _convolution(self, x: Activation, path: str, rows: int, d_in: int, kernel: int, d_out: int) -> Activation:
        """It keeps its input whenever it has a backward pass. `rows`: positions of the result."""
        weights = self.weights((f"{path}.weight", d_in * kernel**2 * d_out))
        (out,) = self.tape.apply([x], [self.size(rows, d_out)], saves=[x], weights=weights)
        return out

    def _patches(self, path: str, image_size: int, patch_size: int, grid: int, width: int) -> Activation:
        """Patch embedding of the pixels, and absolute positions."""
        pixels = Activation(
            Storage(self.size(self.tiles_here * 3, image_size**2), self.tape.item),
            self.size(self.tiles_here * 3, image_size**2),
            False,
        )
        rows, embed = self.tiles_here * grid**2, f"{path}.patch_embed"
        weights = self.weights((f"{embed}.weight", 3 * patch_size**2 * width), (f"{embed}.bias", width))
        (x,) = self.tape.apply([pixels], [self.size(rows, width)], saves=[pixels], weights=weights)
        positions = self.weights((f"{path}.pos_embed", grid**2 * width))
        (x,) = self.tape.apply([x], [x.bytes], weights=positions)
        return x

    def _neck(self, x: Activation, path: str, sam: SamConfig, patches: int) -> Activation:
        neck = sam.neck_width
        x = self._convolution(x, f"{path}.0", patches, sam.width, 1, neck)
        x = self._layer_norm(x, f"{path}.1", patches, neck)
        x = self._convolution(x, f"{path}.2", patches, neck, 3, neck)
        return self._layer_norm(x, f"{path}.3", patches, neck)

    def _bring_down(self, x: Activation, path: str, sam: SamConfig) -> Activation:
        """Resized to four times the side of the features, then two convolutions of stride 2."""
        features, neck = self.tiles_here * self.config.model.siglip.grid**2, sam.neck_width
        (x,) = self.tape.apply([x], [self.size(16 * features, neck)])
        x = self._convolution(x, f"{path}.downsamples.0", 4 * features, neck, 3, 2 * neck)
        return self._convolution(x, f"{path}.downsamples.1", features, 2 * neck, 3, 4 * neck)
