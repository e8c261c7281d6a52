"""Small models with random weights, as checkpoints."""

import inspect
import textwrap
from pathlib import Path

import sentencepiece
import torch

from megavl.checkpoint.fragments import Fragment
from megavl.checkpoint.save import save
from megavl.config.model import ModelConfig
from megavl.config.parameters import parameters
from megavl.config.presets import PRESETS
from tests.models import changed

# Presets: the layouts want what a released model has. Two blocks, of VL2 a dense one and one with experts, and
# a placeholder some ids after the vocabulary of the tokenizer below.
_DECODER = {"layers": 2, "vocab_size": 640}
_GROUPED = _DECODER | {"heads": 8, "kv_heads": 4}
HYBRID, SIGLIP_ONLY = (
    changed(PRESETS[name], name="tiny", decoder=_GROUPED, image_token_id=630)
    for name in ("vl_debug", "vl_debug_siglip")
)
# Of the decoders of Tiny, Small and Base.
MHA_SOFTMAX, MLA_SOFTMAX, MLA_SIGMOID = (
    changed(PRESETS[name], name="tiny", decoder=_DECODER, image_token_id=630)
    for name in ("vl2_debug_mha", "vl2_debug_mla", "vl2_debug")
)

TEXTS = (
    "The page shows a table with four columns: name, price, count and total.",
    "def area(width: float, height: float) -> float:\n    return width * height\n",
    "Zürich, 12 June 1985: 3.14159 and 2.71828 are numbers; naïve café, 中文, ½ € 🎉.",
    "    indented    text\twith  runs   of blanks  ",
)


def weights(model: ModelConfig, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Random values for every parameter; hd_alpha_downsamples is not zero, as it is at initialisation. The biases of
    routers are in fp32 whatever the others are."""
    generator, values = torch.Generator().manual_seed(0), {}
    for parameter in parameters(model):
        value = torch.randn(parameter.shape, generator=generator).mul_(0.05)
        if "norm" in parameter.name and parameter.name.endswith("weight"):
            value += 1
        values[parameter.name] = value.to(dtype if parameter.trained else torch.float32)
    return values


def write_checkpoint(directory: Path, model: ModelConfig, dtype: torch.dtype, tokenizer: Path | None = None) -> Path:
    """A checkpoint of step 3 with parameters and, for bf16, masters, as one process writes it."""
    fragments = []
    for name, weight in weights(model, dtype).items():
        origin = (0,) * weight.dim()
        fragments.append(Fragment.whole(name, "param", tuple(weight.shape), origin, weight))
        if weight.dtype != torch.float32:
            fragments.append(Fragment.whole(name, "master", tuple(weight.shape), origin, weight.float() + 1e-6))
    config = {"model": model.model_dump(mode="json")}
    if tokenizer is not None:
        config["data"] = {"tokenizer": str(tokenizer)}
    return save(directory, 3, fragments, {"config": config, "seed": 0}, keep=1, control=None)


def train_tokenizer(path: Path, **options) -> Path:
    """A small sentencepiece model of `TEXTS` and a module of the standard library."""
    settings = {"model_type": "bpe", "byte_fallback": True, "vocab_size": 400} | options
    with open(path, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter((*TEXTS * 3, *inspect.getsource(textwrap).split("\n"))),
            model_writer=file,
            split_digits=True,
            pad_id=3,
            minloglevel=2,
            **settings,
        )
    return path
