"""Exported tokenizers give the ids of the training, and the placeholder its id."""

import json
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from megavl.checkpoint.error import CheckpointError
from megavl.checkpoint.hf import to_hf
from megavl.checkpoint.hf_tokenizer import write_tokenizer
from tests.checkpoint.models import HYBRID, SIGLIP_ONLY, TEXTS, train_tokenizer, write_checkpoint

# How the project trains its own, and how sentencepiece does by default.
OWN = {"normalization_rule_name": "identity", "add_dummy_prefix": False, "remove_extra_whitespaces": False}
OWN |= {"allow_whitespace_only_pieces": True}
DEFAULT = {"normalization_rule_name": "nmt_nfkc"}
# More than it was trained on: this file.
SAMPLES = (*TEXTS, *Path(__file__).read_text(encoding="utf-8").split("\n\n"))


@pytest.mark.parametrize("byte_fallback", [True, False])
@pytest.mark.parametrize("options", [OWN, DEFAULT], ids=["own", "default"])
@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_sentencepiece_ids_are_kept(tmp_path, model_type, options, byte_fallback):
    """Exact for BPE. Unigram may break ties between equally likely cuts otherwise, which does not happen here."""
    options = {**options, "model_type": model_type, "byte_fallback": byte_fallback}
    path = train_tokenizer(tmp_path / "tokenizer.model", user_defined_symbols=["<box>"], **options)
    written = write_tokenizer(path, tmp_path, 630, "<image_placeholder>")
    assert written == ("<image_placeholder>", {"bos": 1, "eos": 2, "pad": 3})
    reference = sentencepiece.SentencePieceProcessor(model_file=str(path))
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for sample in SAMPLES if model_type == "bpe" else TEXTS:
        if not any(token in sample for token in ("<s>", "</s>", "<image_placeholder>")):
            ids = reference.encode(sample)
            assert tokenizer.encode(sample).ids == ids, sample
            if byte_fallback:
                assert tokenizer.decode(ids) == reference.decode(ids)
    assert tokenizer.token_to_id("<image_placeholder>") == 630
    assert tokenizer.encode("a<image_placeholder><image_placeholder>b").ids[1:3] == [630, 630]
    for id in range(reference.get_piece_size()):
        assert tokenizer.token_to_id(reference.id_to_piece(id)) == id


def _train_json(path: Path, special: list[str]) -> Path:
    """A byte-level BPE with special tokens after its vocabulary, as DeepSeek's has them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(path))
    return path


@pytest.mark.parametrize("image_token_id", [302, 450])
def test_json_tokenizer_gets_the_placeholder(tmp_path, image_token_id):
    """At the next free id and further away, while the special tokens after the vocabulary stay where they are."""
    path = _train_json(tmp_path / "tokenizer.json", ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"])
    before = Tokenizer.from_file(str(path))
    (tmp_path / "out").mkdir()
    written = write_tokenizer(path, tmp_path / "out", image_token_id, "<image>")
    assert written == ("<image>", {"bos": 300, "eos": 301, "pad": 301})
    after = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert after.get_vocab() == before.get_vocab() | {"<image>": image_token_id}
    for sample in SAMPLES[:4]:
        assert after.encode(sample).ids == before.encode(sample).ids


def test_token_that_is_there_already_is_the_image_token(tmp_path):
    path = _train_json(tmp_path / "tokenizer.json", ["</s>", "<image>"])
    settings = {"eos_token": {"content": "</s>"}, "model_max_length": 4096}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "out").mkdir()
    image_token, ids = write_tokenizer(path, tmp_path / "out", 301, "<image_placeholder>")
    assert (image_token, ids) == ("<image>", {"eos": 300, "pad": 300})
    written = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert written["extra_special_tokens"] == {"image_token": "<image>"}
    assert written["model_max_length"] == 4096


def test_files_that_are_no_tokenizers_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="gone.model is not there"):
        write_tokenizer(tmp_path / "gone.model", tmp_path, 1, "<image>")
    (tmp_path / "a.model").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="not a sentencepiece model"):
        write_tokenizer(tmp_path / "a.model", tmp_path, 1, "<image>")
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not a tokenizer.json"):
        write_tokenizer(tmp_path / "a.json", tmp_path, 1, "<image>")


@pytest.mark.parametrize("model", [HYBRID, SIGLIP_ONLY], ids=["hybrid", "siglip"])
def test_processors_of_transformers_load(tmp_path, model):
    """AutoProcessor with tokenizer and image processor, on Pillow where torchvision is not installed."""
    classes = pytest.importorskip("transformers")
    import torch
    from PIL import Image

    tokenizer = train_tokenizer(tmp_path / "tokenizer.model", **OWN)
    path = write_checkpoint(tmp_path / "checkpoints", model, torch.float32, tokenizer)
    to_hf(path, tmp_path / "hf", "transformers", report=lambda line: None)
    processor = classes.AutoProcessor.from_pretrained(tmp_path / "hf")
    assert type(processor).__name__ == ("DeepseekVLHybridProcessor" if model.sam else "DeepseekVLProcessor")
    assert (processor.image_token_id, processor.num_image_tokens) == (model.image_token_id, model.tile_features)
    image = Image.new("RGB", (60, 30), (200, 10, 10))
    inputs = processor(images=[image], text="red: <image_placeholder>.", return_tensors="pt")
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    expected = reference.encode("red: ") + [model.image_token_id] * model.tile_features + reference.encode(".")
    assert inputs["input_ids"][0].tolist() == expected
    assert inputs["pixel_values"].shape == (1, 3, model.siglip.image_size, model.siglip.image_size)
    assert ("high_res_pixel_values" in inputs) == (model.sam is not None)
    # A red pixel in the middle, by the mean and deviation of the tower: (200 / 255 - 0.5) / 0.5.
    assert inputs["pixel_values"][0, 0, 16, 16].item() == pytest.approx((200 / 255 - 0.5) / 0.5, abs=1e-5)
    fast = classes.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert (fast.bos_token_id, fast.eos_token_id, fast.pad_token_id) == (1, 2, 3)
    for text in TEXTS:
        assert fast(text)["input_ids"] == reference.encode(text)
