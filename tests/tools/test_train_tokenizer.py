"""The tokenizer of the quickstart loses nothing and is the same each time."""

import json
import subprocess
import sys
from keyword import kwlist
from pathlib import Path

import pytest
import sentencepiece

ROOT = Path(__file__).parents[2]


def train(inputs, output, *options):
    command = [sys.executable, "tools/train_tokenizer.py", "--input", *inputs, "--output", output, *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture
def documents(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [
        " ".join(kwlist[(i * k) % len(kwlist)] for k in range(1, 12)) + f" {i}\n    code_{i}()" for i in range(200)
    ]
    records = [{"text": line} for line in lines[:100]]
    records += [{"segments": [{"image": "x.png"}, {"text": line}]} for line in lines[100:]]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_model(documents, tmp_path):
    outputs = [tmp_path / "one.model", tmp_path / "two.model"]
    for output in outputs:
        done = train([documents], output, "--vocab-size", "400")
        assert done.returncode == 0, done.stderr
    assert outputs[0].read_bytes() == outputs[1].read_bytes()
    assert not list(tmp_path.glob("*.partial"))

    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(outputs[0]))
    assert tokenizer.vocab_size() == 400
    ids = (tokenizer.unk_id(), tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.pad_id())
    assert ids == (0, 1, 2, 3)
    for text in ("return the  value\n    code_7()\n", " leading", "größer 数 \t\x00", "a" * 300):
        tokens = tokenizer.encode(text)
        assert tokenizer.decode(tokens) == text and not set(ids) & set(tokens)
    # Learned pieces, not single bytes: the words of the corpus are few tokens.
    assert len(tokenizer.encode("return from while")) <= 6


@pytest.mark.parametrize(
    ("line", "message"), [("{broken", "a.jsonl:2"), ('{"txt": "x"}', "a.jsonl:2"), ("[1]", "a.jsonl:2")]
)
def test_a_line_that_is_no_document_is_named(line, message, tmp_path):
    path, output = tmp_path / "a.jsonl", tmp_path / "t.model"
    path.write_text(json.dumps({"text": "hello"}) + "\n" + line + "\n")
    done = train([path], output)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


def test_too_little_text_for_the_vocabulary(documents, tmp_path):
    done = train([documents], tmp_path / "t.model", "--vocab-size", "30000")
    assert done.returncode == 1 and "train_tokenizer:" in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.glob("t.model*"))
