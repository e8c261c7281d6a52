"""A dataset with everything that is shown: prompts, special tokens, images, and documents that attack the page."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import sentencepiece

from megavl.data.encoded import EncodedDocument, EncodedImage
from megavl.data.store import Store
from megavl.data.tokenizer import Tokenizer, load_tokenizer
from megavl.data.writer import StoreWriter
from tests.data.conftest import encoded_text, image_bytes

HOSTILE = "</script><script>document.title = 'broken out'</script><!-- <img src=x onerror=alert(1)> & \u2028 {{data}}"
DIALOGUE = "What is this?\n"
ANSWER = "Ein Käfer, 甲虫, a 🪲.\n  indented\ttext \ufffd"


@dataclass(frozen=True)
class Gallery:
    """Documents: 0 text alone (hostile), 1 prompt, image, answer, 2 two images and an image that does not decode,
    3 text of 300 tokens, and 4 with the key of 1."""

    store: Store
    tokenizer: Tokenizer
    tokenizer_path: str
    recipe: Path


@pytest.fixture(scope="session")
def gallery(tmp_path_factory, tiled_model) -> Gallery:
    root = tmp_path_factory.mktemp("gallery")
    (root / "text").write_text(f"{DIALOGUE} {ANSWER} a beetle on a leaf\n" * 30, encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(root / "text"),
        model_prefix=str(root / "tokenizer"),
        vocab_size=330,
        byte_fallback=True,
        hard_vocab_limit=False,
        model_type="bpe",
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        minloglevel=2,
    )
    tokenizer = load_tokenizer(str(root / "tokenizer.model"))

    def text(words: str, supervised: bool = True, end: bool = False):
        return encoded_text(*tokenizer.encode(words), *[tokenizer.eos] * end, supervised=supervised)

    def picture(seed: int, form: str = "PNG"):
        return EncodedImage(image_bytes(seed, (60, 30), form), 60, 30)

    documents = [
        EncodedDocument("hostile " + HOSTILE, "pages.jsonl", (text(HOSTILE, end=True),)),
        EncodedDocument("beetle", "dialogues.jsonl", (text(DIALOGUE, False), picture(0), text(ANSWER, end=True))),
        EncodedDocument(
            "pictures",
            "pages.jsonl",
            (picture(1, "JPEG"), text("a"), picture(0), EncodedImage(b"no image", 5, 5), text("", end=True)),
        ),
        EncodedDocument("long", "pages.jsonl", (encoded_text(*([*tokenizer.encode("a leaf ")] * 300)[:300]),)),
        EncodedDocument("beetle", "dialogues.jsonl", (picture(2), text("again", end=True))),
    ]
    with StoreWriter(str(root / "gallery"), tokenizer) as writer:
        writer.add(*documents)
    recipe = {
        "output_dir": str(root / "run"),
        "model": tiled_model.model_dump(mode="json"),
        "data": {
            "tokenizer": str(root / "tokenizer.model"),
            "multimodal": [{"prefix": str(root / "gallery")}],
            "text_ratio": 0.0,
            "seq_len": 128,
            "max_tiles": 8,
        },
        "optim": {"lr": 1e-3},
        "train": {"steps": 4, "global_batch": 8},
    }
    (root / "recipe.yaml").write_text(json.dumps(recipe))
    return Gallery(Store(str(root / "gallery")), tokenizer, str(root / "tokenizer.model"), root / "recipe.yaml")
