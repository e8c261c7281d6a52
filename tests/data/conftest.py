"""A small corpus: a tokenizer, text and interleaved documents, and the stores made of them."""

import io
import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from PIL import Image

from megavl.config.model import ModelConfig
from megavl.config.run import DataConfig, SourceConfig, TrainConfig
from megavl.config.tiles import Grid
from megavl.data.build import build
from megavl.data.encoded import EncodedText
from megavl.data.image import empty_pixels, preprocess
from tests.models import HYBRID, MHA_SOFTMAX, changed

OVERVIEW = Grid(0, 0)
# Room for the corpus's vocabulary.
_VOCABULARY = {"name": "data", "decoder": {"vocab_size": 400}, "image_token_id": 399}
# Both towers, 16 tokens per image.
MODEL = changed(HYBRID, **_VOCABULARY)
# One tower and up to four local tiles, 13 to 31 tokens. With tiles of 15 pixels hardly an image would take one or two.
TILED_MODEL = changed(MHA_SOFTMAX, **_VOCABULARY, siglip={"image_size": 32, "patch_size": 8})
IMAGE_SIZES = [(40, 90), (90, 40), (64, 64), (7, 120), (33, 21)]


@dataclass(frozen=True)
class Corpus:
    """Files under `root`: tokenizer.model, {text,more,multimodal}.jsonl and the stores of the same names."""

    root: Path

    @property
    def tokenizer(self) -> str:
        return str(self.root / "tokenizer.model")

    def prefix(self, name: str) -> str:
        return str(self.root / name)

    def data(self, **changes) -> DataConfig:
        """Both modalities, one source each."""
        values = {
            "tokenizer": self.tokenizer,
            "text": (SourceConfig(prefix=self.prefix("text")),),
            "multimodal": (SourceConfig(prefix=self.prefix("multimodal")),),
            "text_ratio": 0.5,
            "seq_len": 96,
            "workers": 0,
        }
        return DataConfig(**values | changes)


def image_bytes(seed: int, size: tuple[int, int], form: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


def pixels_of(
    image: Image.Image, model: ModelConfig, grid: Grid = OVERVIEW, tiles: range | None = None
) -> torch.Tensor:
    """What `preprocess` writes for one image, by default all of its tiles: uint8 [tiles, 3, S, S]."""
    tiles = range(grid.tiles) if tiles is None else tiles
    over_black, over_white = (empty_pixels(model, len(tiles)).fill_(before) for before in (0, 255))
    for pixels in (over_black, over_white):
        preprocess(image, model, grid, tiles, pixels)
    assert torch.equal(over_black, over_white), "not every pixel was written"
    return over_black


def encoded_text(*tokens: int, supervised: bool = True) -> EncodedText:
    return EncodedText(np.array(tokens, dtype=np.int64), supervised)


def write_jsonl(path: Path, records: list) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Corpus:
    root = tmp_path_factory.mktemp("corpus")
    random_ = random.Random(0)
    words = ["".join(random_.choice("abcdefghij") for _ in range(random_.randint(2, 7))) for _ in range(300)]

    def text(most: int) -> str:
        return " ".join(random_.choice(words) for _ in range(random_.randint(1, most)))

    for index, size in enumerate(IMAGE_SIZES):
        (root / f"{index}.png").write_bytes(image_bytes(index, size))
    files = {
        "text": [{"id": f"text-{index}", "text": text(40)} for index in range(150)],
        "more": [{"id": f"more-{index}", "text": text(10)} for index in range(70)],
        "multimodal": [
            {
                "id": index,
                "segments": [
                    {"image": f"{random_.randrange(len(IMAGE_SIZES))}.png"}
                    if random_.random() < 0.4
                    else {"text": text(60)}
                    for _ in range(random_.randint(1, 5))
                ],
            }
            for index in range(60)
        ],
    }
    for name, records in files.items():
        write_jsonl(root / f"{name}.jsonl", records)
    sentencepiece.SentencePieceTrainer.train(
        input=str(root / "text.jsonl"),
        model_prefix=str(root / "tokenizer"),
        vocab_size=300,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    for name in files:
        build([str(root / f"{name}.jsonl")], str(root / name), str(root / "tokenizer.model"))
    return Corpus(root)


@pytest.fixture(scope="session")
def model() -> ModelConfig:
    """Only its shapes matter here."""
    return MODEL


@pytest.fixture(scope="session")
def tiled_model() -> ModelConfig:
    return TILED_MODEL


@pytest.fixture(scope="session")
def train() -> TrainConfig:
    return TrainConfig(steps=8, global_batch=12, micro_batch=1, seed=7)
