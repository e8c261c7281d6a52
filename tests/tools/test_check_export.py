"""The proof of an export: it passes a right one, and fails one of which a single value differs."""

import io
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from megavl.checkpoint.error import CheckpointError
from megavl.checkpoint.hf import to_hf
from megavl.config.tiles import Tiling
from megavl.data.encoded import EncodedDocument, EncodedImage
from megavl.data.errors import DataError
from megavl.data.tokenizer import load_tokenizer
from megavl.data.writer import StoreWriter
from tests.checkpoint.models import (
    HYBRID,
    MHA_SOFTMAX,
    MLA_SIGMOID,
    MLA_SOFTMAX,
    SIGLIP_ONLY,
    TEXTS,
    train_tokenizer,
    write_checkpoint,
)
from tests.data.conftest import encoded_text

ROOT = Path(__file__).parents[2]


@pytest.fixture
def compare(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    from exports import compare

    return compare


def _write_store(prefix: Path, tokenizer_path: Path) -> None:
    """A document with two images, and one of text alone."""
    tokenizer = load_tokenizer(str(tokenizer_path))
    images = []
    for colour, size in (((200, 10, 60), (50, 30)), ((0, 90, 250), (20, 70))):
        data = io.BytesIO()
        Image.new("RGB", size, colour).save(data, "PNG")
        images.append(EncodedImage(data.getvalue(), *size))
    ends = ((), (), (tokenizer.eos,), (tokenizer.eos,))
    words = [encoded_text(*tokenizer.encode(text), *end) for text, end in zip(TEXTS, ends, strict=True)]
    with StoreWriter(str(prefix), tokenizer) as store:
        store.add(EncodedDocument("0", "here", (words[0], images[0], words[1], images[1], words[2])))
        store.add(EncodedDocument("1", "here", (words[3],)))


@pytest.mark.parametrize(
    ("model", "wrong"),
    [
        pytest.param(HYBRID, "model.aligner.proj.bias", id="hybrid"),
        pytest.param(SIGLIP_ONLY, "model.aligner.linear2.bias", id="siglip"),
        pytest.param(MHA_SOFTMAX, "view_seperator", id="mha_softmax"),
        pytest.param(MLA_SOFTMAX, "language.model.layers.1.mlp.experts.3.down_proj.weight", id="mla_softmax"),
        pytest.param(MLA_SIGMOID, "language.model.layers.1.mlp.gate.e_score_correction_bias", id="mla_sigmoid"),
    ],
)
def test_losses_agree_and_a_wrong_value_shows(compare, tmp_path, capsys, model, wrong):
    """Measured on a token: 9.5e-7 at most, and from 4e-2 to 1.1 with the wrong value."""
    pytest.importorskip("transformers")
    tokenizer = train_tokenizer(tmp_path / "tokenizer.model")
    checkpoint = write_checkpoint(tmp_path / "checkpoints", model, torch.bfloat16, tokenizer)
    layout = "transformers" if model.family == "vl" else "deepseek"
    to_hf(checkpoint, tmp_path / "hf", layout, report=lambda line: None)
    _write_store(tmp_path / "heldout", tokenizer)
    Image.new("RGB", (40, 40), (9, 200, 9)).save(tmp_path / "green.png")
    arguments = (str(checkpoint), tmp_path / "hf", str(tmp_path / "heldout"), tmp_path / "green.png", 512)
    assert compare.check(*arguments)
    printed = capsys.readouterr().out
    difference = float(printed.split("on a token:")[1].split()[0])
    assert difference < 1e-5 < compare.TOLERANCE
    # Both documents twice; tiles take more of the pack.
    assert ("4 images" if model.family == "vl" else "2 images") in printed
    assert "green.png:" in printed

    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    tensors[wrong][0] += 2.0
    save_file(tensors, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    assert not compare.check(*arguments[:3], None, 512)


def test_what_cannot_be_compared_is_refused_before_anything_is_computed(compare, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    tokenizer = train_tokenizer(tmp_path / "tokenizer.model")
    checkpoint = str(write_checkpoint(tmp_path / "checkpoints", SIGLIP_ONLY, torch.bfloat16, tokenizer))
    other = write_checkpoint(tmp_path / "others", HYBRID, torch.bfloat16, tokenizer)
    for source, name, layout in ((checkpoint, "hf", "transformers"), (other, "other", "transformers")):
        to_hf(source, tmp_path / name, layout, report=lambda line: None)
    to_hf(checkpoint, tmp_path / "deepseek", "deepseek", report=lambda line: None)
    _write_store(tmp_path / "heldout", tokenizer)
    (tmp_path / "text.png").write_text("no image")
    data, gone = str(tmp_path / "heldout"), tmp_path / "gone"
    monkeypatch.setattr(compare, "load_model", lambda *arguments: pytest.fail("megavl's side was computed"))
    for arguments, error, message in (
        ((checkpoint, tmp_path / "other", data, None), CheckpointError, "other is no export .*sam.* here"),
        ((checkpoint, tmp_path / "deepseek", data, None), CheckpointError, "--layout transformers"),
        ((checkpoint, gone, data, None), CheckpointError, "gone is no directory with a config.json"),
        ((str(gone), tmp_path / "hf", data, None), CheckpointError, "no checkpoint in .*gone"),
        ((checkpoint, tmp_path / "hf", str(gone), None), DataError, "gone.* not found"),
        ((checkpoint, tmp_path / "hf", data, gone), DataError, "--image .*gone.*give an image file"),
        ((checkpoint, tmp_path / "hf", data, tmp_path / "text.png"), DataError, "no AVIF, BMP, .* file"),
    ):
        with pytest.raises(error, match=message):
            compare.check(*arguments, 512)
    most = int(Tiling(SIGLIP_ONLY).tokens.max())
    with pytest.raises(DataError, match=f"--tokens {most}: an image takes up to {most} tokens and is never split"):
        compare.check(checkpoint, tmp_path / "hf", data, None, most)
