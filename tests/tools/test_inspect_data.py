"""The command line of the inspection."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megavl.data.inspect.sample import find
from megavl.data.store import Store

ROOT = Path(__file__).parents[2]


def run(*arguments, code=0) -> subprocess.CompletedProcess:
    result = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "inspect_data.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"},
        timeout=120,
    )
    assert result.returncode == code, result.stderr
    return result


def test_counts_and_lengths_of_datasets(corpus):
    shown = run(corpus.prefix("text"), corpus.prefix("multimodal")).stdout
    for name in ("text", "multimodal"):
        store = Store(corpus.prefix(name))
        assert corpus.prefix(name) in shown and str(corpus.root / f"{name}.jsonl") in shown
        assert f"{len(store.lengths):,}" in shown
    assert "2 datasets together" in shown and "tokens per document" in shown


def test_documents_by_key_and_number(corpus):
    prefix = corpus.prefix("multimodal")
    with_image = next(number for number in range(60) if len(Store(prefix).rows(number, number + 1)["images"][0]))
    shown = run(prefix, "--tokenizer", corpus.tokenizer, "--key", with_image, "--document", 3).stdout
    assert find(Store(prefix), str(with_image)) == [with_image]
    assert f"{with_image} (document {with_image} of {prefix}" in shown and f"(document 3 of {prefix}" in shown
    assert " PNG " in shown and "[image " in shown and "</s>" in shown
    assert "tokens per document" not in shown


def test_the_page_of_datasets_and_of_their_packs(corpus, tmp_path):
    prefixes = [corpus.prefix("text"), corpus.prefix("multimodal")]
    options = ("--tokenizer", corpus.tokenizer, "--samples", 3, "--model", "vl_debug", "--seq-len", 96)
    result = run(*prefixes, *options, "--html", tmp_path / "made" / "page.html")
    assert result.stdout.splitlines()[-1] == str(tmp_path / "made" / "page.html")
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["page.html"]
    text = (tmp_path / "made" / "page.html").read_text()
    assert '"seq_len":96' in text and text.count('"left_tokens":') == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("absent",), "dataset absent: absent.bin, absent.idx, absent.meta not found"),
        (("{text}", "--key", "nothing"), "text has the key 'nothing'"),
        (("{text}", "--document", "150"), "has no document 150; it has the documents 0 to 149"),
        (("{text}", "--config", "absent.yaml"), "absent.yaml"),
    ],
)
def test_what_cannot_be_shown_is_one_message(corpus, arguments, message):
    result = run(*(argument.format(text=corpus.prefix("text")) for argument in arguments), code=1)
    assert result.stderr.startswith("error: ") and message in result.stderr and "Traceback" not in result.stderr


def test_another_tokenizer_is_refused(corpus, tmp_path):
    other = tmp_path / "other.json"
    other.write_text(OTHER)
    result = run(corpus.prefix("text"), "--tokenizer", other, code=1)
    assert "was made with another tokenizer" in result.stderr and "or none to see the ids" in result.stderr


OTHER = """{"version": "1.0", "truncation": null, "padding": null, "normalizer": null, "pre_tokenizer": null,
"post_processor": null, "decoder": null,
"added_tokens": [{"id": 1, "content": "</s>", "special": true, "single_word": false, "lstrip": false, "rstrip": false,
"normalized": false}],
"model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
"end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": {"a": 0, "</s>": 1}, "merges": []}}"""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "name datasets, or a recipe"),
        (("p", "--seq-len", "96"), "--seq-len needs the --tokenizer"),
        (("p", "--samples", "0"), "--samples 0: at least 1"),
        (("p", "--config", "r", "--seq-len", "96"), "leave --seq-len out"),
    ],
)
def test_arguments_that_do_not_go_together(arguments, message):
    assert message in run(*arguments, code=2).stderr
