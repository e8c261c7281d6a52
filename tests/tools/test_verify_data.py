"""The command line of the verification."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megavl.data.encoded import EncodedDocument
from megavl.data.format import IMAGE
from megavl.data.store import Store
from megavl.data.tokenizer import load_tokenizer
from megavl.data.writer import StoreWriter
from tests.data.conftest import encoded_text

ROOT = Path(__file__).parents[2]


def run(*arguments, code=0) -> str:
    result = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "verify_data.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=120,
    )
    assert result.returncode == code, result.stderr
    return result.stdout


@pytest.mark.parametrize(
    ("images", "said"), [("all", "images"), ("sample", "images (1 document in 16)"), ("none", "images (not decoded)")]
)
def test_sound_datasets(corpus, images, said):
    prefixes = [corpus.prefix("text"), corpus.prefix("multimodal")]
    shown = run(*prefixes, "--tokenizer", corpus.tokenizer, "--images", images, "--workers", 1).splitlines()
    passed = f"  passed: checksums, index, tokens, {said}, tokenizer, keys"
    assert shown == [f"{prefixes[0]}: as it was written", passed, f"{prefixes[1]}: as it was written", passed]


def test_everything_wrong_is_listed_and_the_other_datasets_are_verified(corpus, tmp_path):
    for suffix in ("bin", "idx", "meta"):
        shutil.copy(corpus.prefix("multimodal") + f".{suffix}", tmp_path / f"p.{suffix}")
    store = Store(str(tmp_path / "p"))
    images = np.flatnonzero(store.modes == IMAGE)[:2].tolist()
    with open(tmp_path / "p.bin", "r+b") as file:
        for sequence in images:
            file.seek(int(store.pointers[sequence]) + 4)
            file.write(b"\0" * 20)
    shown = run(tmp_path / "absent", tmp_path / "p", corpus.prefix("text"), "--workers", 2, code=1).splitlines()
    assert shown[0] == f"{tmp_path / 'absent'}: 1 error" and "absent.bin" in shown[2]
    assert shown[3] == f"{tmp_path / 'p'}: 3 errors"
    assert shown[4] == "  passed: index, tokens, keys"
    assert shown[5].startswith("  checksums: 1; copy the file again")
    assert shown[7].startswith("  images: 2; remove these documents")
    assert [f"its sequence {sequence}" in line for sequence, line in zip(images, shown[8:10], strict=True)] == [
        True
    ] * 2
    assert shown[10] == f"{corpus.prefix('text')}: as it was written"


def test_repeated_keys_are_a_warning(corpus, tmp_path):
    with StoreWriter(str(tmp_path / "p"), load_tokenizer(corpus.tokenizer)) as writer:
        writer.add(*(EncodedDocument("\x1b[2Jsame", "f", (encoded_text(1, 2),)) for _ in range(3)))
    shown = run(tmp_path / "p", "--workers", 1)
    assert f"{tmp_path / 'p'}: as it was written" in shown and "  keys: 1; a warning: " in shown
    assert "of document 0 is that of 3 documents" in shown and "\x1b" not in shown
