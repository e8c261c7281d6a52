"""An export of DeepSeek-VL2, its language part as transformers computes it.

transformers has no such model, but the three decoders: `deepseek_v2` (latent attention, softmax router), `deepseek_v3`
(latent attention, sigmoid router with a bias) and the text model of `deepseek_ocr2` (ordinary attention, softmax
router). The vision part is megavl's own, with the weights of the export.
"""

import json
import re
from pathlib import Path

import torch
from exports.document import Document
from PIL import Image
from torch import Tensor, nn

from megavl.batch import Batch
from megavl.checkpoint.error import CheckpointError, some
from megavl.checkpoint.maps import deepseek_vl_v2
from megavl.checkpoint.shards import Shards
from megavl.config.model import ModelConfig
from megavl.config.tiles import Tiling
from megavl.data.image import empty_pixels, preprocess
from megavl.model.stem import Stem
from megavl.parallel.groups import TensorAxis

_LANGUAGE = "language."
# transformers has the experts of a layer as one tensor, of which each is made of these of the export.
_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


class ExportedVL2:
    """Nothing is loaded before `load`."""

    def __init__(self, directory: Path, config: ModelConfig):
        self._directory, self._config = directory, config

    def load(self) -> None:
        """
        Raises:
            CheckpointError: the export does not have the tensors of the decoder of transformers.
        """
        shards = Shards(self._directory)
        self._language = language_model(self._directory, self._config)
        load_language(self._language, shards)
        self._stem = Stem(self._config, TensorAxis())
        for rule in deepseek_vl_v2.tensor_rules(self._config):
            if rule.ours.startswith("stem."):
                tensor = rule.restore([shards.read(name) for name in rule.theirs])
                self._stem.get_parameter(rule.ours.removeprefix("stem.")).data.copy_(tensor)

    def logits(self, document: Document) -> Tensor:
        """[T, V]. Text is looked up by the model of transformers, images among it by the stem."""
        if not document.grids:
            return self._language(input_ids=document.tokens[None], use_cache=False).logits[0]
        return self._language(inputs_embeds=self._embed(document)[None], use_cache=False).logits[0]

    def generate(self, image: Image.Image, tokens: int) -> str:
        """What the model writes after one image, greedily."""
        from tokenizers import Tokenizer

        config = self._config
        settings = json.loads((self._directory / "generation_config.json").read_text(encoding="utf-8"))
        tiling = Tiling(config)
        grid = tiling.grid(*image.size, images=1)
        pixels = empty_pixels(config, grid.tiles)
        preprocess(image, config, grid, range(grid.tiles), pixels)
        placeholders = torch.full((len(tiling.layout(grid)),), config.image_token_id)
        h = self._embed(Document(placeholders, placeholders, (grid,), pixels))[None]  # [1, T, D]
        written: list[int] = []
        while len(written) < tokens and settings.get("eos_token_id") not in written:
            token = self._language(inputs_embeds=h, use_cache=False).logits[0, -1].argmax()
            written.append(int(token))
            h = torch.cat((h, self._language.model.embed_tokens(token)[None, None]), dim=1)
        return Tokenizer.from_file(str(self._directory / "tokenizer.json")).decode(written, skip_special_tokens=True)

    def _embed(self, document: Document) -> Tensor:
        """[T, D]."""
        batch = Batch.of(
            Tiling(self._config),
            tokens=document.tokens,
            labels=document.labels,
            lengths=[len(document.tokens)],
            packs=1,
            grids=document.grids,
            pixels=document.pixels,
        )
        return self._stem(batch)


def language_model(directory: Path, config: ModelConfig) -> nn.Module:
    """The decoder of transformers that the export's config.json describes, in float32, without values."""
    from transformers.initialization import no_init_weights

    fields = json.loads((directory / "config.json").read_text(encoding="utf-8"))["language_config"]
    kept = {name: value for name, value in fields.items() if name not in ("model_type", "architectures", "torch_dtype")}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": kept.pop("rope_theta")}}
    with no_init_weights():
        return _decoder(config, {**kept, **rope, "dtype": torch.float32, "pad_token_id": None}).eval()


def _decoder(config: ModelConfig, fields: dict) -> nn.Module:
    import transformers

    decoder = config.decoder
    if decoder.mla is None:
        kinds = ["sparse" if decoder.has_experts(layer) else "dense" for layer in range(decoder.layers)]
        return _Ocr2Text({**fields, "mlp_layer_types": kinds})
    family = "DeepseekV2" if decoder.moe.router == "softmax" else "DeepseekV3"
    config_class = getattr(transformers, f"{family}Config")
    return getattr(transformers, f"{family}ForCausalLM")(config_class(**fields))


class _Ocr2Text(nn.Module):
    """The text model of deepseek_ocr2 with a head, which transformers has only behind its vision part."""

    def __init__(self, fields: dict):
        from transformers.models.deepseek_ocr2.configuration_deepseek_ocr2 import DeepseekOcr2TextConfig
        from transformers.models.deepseek_ocr2.modeling_deepseek_ocr2 import DeepseekOcr2TextModel

        super().__init__()
        self.model = DeepseekOcr2TextModel(DeepseekOcr2TextConfig(**fields))
        self.lm_head = nn.Linear(fields["hidden_size"], fields["vocab_size"], bias=False)

    def forward(self, **inputs):
        from transformers.modeling_outputs import CausalLMOutput

        return CausalLMOutput(logits=self.lm_head(self.model(**inputs).last_hidden_state))


@torch.no_grad()
def load_language(model: nn.Module, shards: Shards) -> None:
    """Fill the decoder with the tensors of an export, read one at a time.

    Raises:
        CheckpointError: some are missing, or some of the language part are left over.
    """
    left = {name for name in shards.shapes if name.startswith(_LANGUAGE)}

    def take(name: str) -> Tensor:
        if f"{_LANGUAGE}{name}" not in left:
            raise CheckpointError(f"{shards.directory} has no {_LANGUAGE}{name}, which {type(model).__name__} needs")
        left.remove(f"{_LANGUAGE}{name}")
        return shards.read(f"{_LANGUAGE}{name}")

    for name, tensor in model.state_dict().items():
        stacked = re.fullmatch(r"(.*\.experts)\.(gate_up_proj|down_proj)", name)
        if stacked is None:
            tensor.copy_(take(name))
            continue
        for index, expert in enumerate(tensor):
            expert.copy_(torch.cat([take(f"{stacked[1]}.{index}.{part}.weight") for part in _PARTS[stacked[2]]]))
    if left:
        raise CheckpointError(
            f"{shards.directory} has tensors that {type(model).__name__} has not: {some(sorted(left))}"
        )
