"""The proof of an export: it passes a right one, and fails one of which a single value differs."""

import io
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from megavl.checkpoint.hf import to_hf
from megavl.data.store import EncodedDocument, EncodedImage, StoreWriter
from megavl.data.tokenizer import load_tokenizer
from tests.checkpoint.models import HYBRID, SIGLIP_ONLY, TEXTS, train_tokenizer, write_checkpoint
from tools.check_export import TOLERANCE, check


def _write_store(prefix: Path, tokenizer_path: Path) -> None:
    """A document with two images, and one of text alone."""
    tokenizer = load_tokenizer(str(tokenizer_path))
    images = []
    for colour, size in (((200, 10, 60), (50, 30)), ((0, 90, 250), (20, 70))):
        data = io.BytesIO()
        Image.new("RGB", size, colour).save(data, "PNG")
        images.append(EncodedImage(data.getvalue(), *size))
    words = [tokenizer.encode(text) for text in TEXTS]
    with StoreWriter(str(prefix), tokenizer, multimodal=True) as store:
        store.add(EncodedDocument("0", "here", (words[0], images[0], words[1], images[1], [*words[2], tokenizer.eos])))
        store.add(EncodedDocument("1", "here", ([*words[3], tokenizer.eos],)))


@pytest.mark.parametrize("model", [HYBRID, SIGLIP_ONLY], ids=["hybrid", "siglip"])
def test_losses_agree_and_a_wrong_value_shows(tmp_path, capsys, model):
    """Measured on a token: 1e-6 at most, and 2e-2 and 9e-3 with the wrong value."""
    pytest.importorskip("transformers")
    tokenizer = train_tokenizer(tmp_path / "tokenizer.model")
    checkpoint = write_checkpoint(tmp_path / "checkpoints", model, torch.bfloat16, tokenizer)
    to_hf(checkpoint, tmp_path / "hf", "transformers", report=lambda line: None)
    _write_store(tmp_path / "heldout", tokenizer)
    Image.new("RGB", (40, 40), (9, 200, 9)).save(tmp_path / "green.png")
    arguments = (str(checkpoint), tmp_path / "hf", str(tmp_path / "heldout"), tmp_path / "green.png", 512)
    assert check(*arguments)
    printed = capsys.readouterr().out
    difference = float(printed.split("on a token:")[1].split()[0])
    assert difference < 1e-5 < TOLERANCE
    assert "4 images" in printed  # both documents twice
    assert "green.png:" in printed

    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    tensors["model.aligner.proj.bias" if model.sam else "model.aligner.linear2.bias"][0] += 2.0
    save_file(tensors, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    assert not check(*arguments[:3], None, 512)
