"""The tokenizer of the quickstart loses nothing and is the same each time."""

import json
import os
import subprocess
import sys
from keyword import kwlist
from pathlib import Path

import pytest
import sentencepiece

from megavl.config.tokens import VL2
from megavl.data.document import Document, Image
from megavl.data.encode import encode
from megavl.data.grounding import Object, locate
from megavl.data.template import TEMPLATES
from megavl.data.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[2]


def train(inputs, output, *options):
    command = [sys.executable, "tools/train_tokenizer.py", "--input", *inputs, "--output", output, *options]
    return subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)


@pytest.fixture
def documents(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [
        " ".join(kwlist[(i * k) % len(kwlist)] for k in range(1, 12)) + f" {i}\n    code_{i}()" for i in range(200)
    ]
    records = [{"text": line} for line in lines[:100]]
    records += [{"segments": [{"image": "x.png"}, {"text": line}]} for line in lines[100:]]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "x.png").write_bytes(b"read with its record, and not looked at")
    return path


def test_model(documents, tmp_path):
    outputs = [tmp_path / "one.model", tmp_path / "made" / "here" / "two.model"]
    for output in outputs:
        done = train([documents], output, "--vocab-size", "400")
        assert done.returncode == 0, done.stderr
    assert outputs[0].read_bytes() == outputs[1].read_bytes()
    assert not list(tmp_path.rglob("*.partial"))

    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(outputs[0]))
    assert tokenizer.vocab_size() == 400
    ids = (tokenizer.unk_id(), tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.pad_id())
    assert ids == (0, 1, 2, 3)
    for text in ("return the  value\n    code_7()\n", " leading", "größer 数 \t\x00", "a" * 300):
        tokens = tokenizer.encode(text)
        assert tokenizer.decode(tokens) == text and not set(ids) & set(tokens)
    # Learned pieces, not single bytes: the words of the corpus are few tokens.
    assert len(tokenizer.encode("return from while")) <= 6


def test_special_tokens_of_vl2(documents, tmp_path):
    """Behind the learned pieces, `<image>` last; in text none of them is found."""
    output = tmp_path / "t.model"
    done = train([documents], output, "--vocab-size", "400", "--family", "vl2")
    assert done.returncode == 0, done.stderr
    tokenizer = load_tokenizer(str(output))
    assert tokenizer.vocab_size == 400 and tokenizer.eos == tokenizer.token("<｜end▁of▁sentence｜>") == 2
    assert [tokenizer.token(name) for name in VL2] == list(range(392, 400)) and VL2[-1] == "<image>"
    assert (tokenizer.token("<｜begin▁of▁sentence｜>"), tokenizer.token("<｜▁pad▁｜>")) == (1, 3)
    fast, text = load_tokenizer(str(output)), "<|User|>: <image> <|ref|> return\n"
    fast.accelerate()
    for tokens in (tokenizer.encode(text), fast.encode_batch([text])[0].tolist()):
        assert tokenizer.decode(tokens) == text and not {1, 2, 3, *range(392, 400)} & set(tokens)
    segments = TEMPLATES["vl2"].write(locate(Image(b"", "a.png"), (9, 9), [Object("return", ((0, 0, 9, 9),))]))
    (document,) = encode([Document("key", "file", segments[:3] + segments[4:])], tokenizer)
    read, learned = document.sequences
    assert [token for token in learned.tokens if token > 390] == [392, 393, 394, 395]
    assert tokenizer.decode([*map(int, read.tokens)]) == ": \nLocate return in the given image.\n\n:"


def refused(done) -> str:
    """The one line with which the command ended."""
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    return done.stderr


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", "is not JSON"),
        ('{"txt": "x"}', 'has no key of a layout (its keys: "txt")'),
        ("[1]", "is a list ([1])"),
        ('{"text": 5}', '"text" is a number (5); it must be a string'),
    ],
)
def test_a_line_that_is_no_document_is_named(line, message, tmp_path):
    path, output = tmp_path / "a.jsonl", tmp_path / "t.model"
    path.write_text(json.dumps({"text": "hello"}) + "\n" + line + "\n")
    said = refused(train([path], output))
    assert "a.jsonl:2: " in said and message in said
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


def test_input_without_text(tmp_path):
    (tmp_path / "a.jsonl").touch()
    assert "no text in" in refused(train([tmp_path / "a.jsonl"], tmp_path / "t.model"))
    assert "b.jsonl: no such file" in refused(train([tmp_path / "b.jsonl"], tmp_path / "t.model"))
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


def test_an_output_below_a_file_or_that_is_a_directory(documents, tmp_path):
    assert "is a directory" in refused(train([documents], tmp_path, "--vocab-size", "400"))
    said = refused(train([documents], documents / "t.model", "--vocab-size", "400"))
    assert "a.jsonl/t.model cannot be written" in said and "choose another --output" in said


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ("30000", "the corpus is too small for 30000 pieces: it gives "),
        ("270", "270 pieces are too few for the corpus's characters. Raise --vocab-size to "),
        ("260", "--vocab-size 260 leaves no piece to learn"),
    ],
)
def test_a_vocabulary_that_does_not_fit_the_corpus(size, message, documents, tmp_path):
    assert message in refused(train([documents], tmp_path / "t.model", "--vocab-size", size))
    assert not list(tmp_path.glob("t.model*"))
