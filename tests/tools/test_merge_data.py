"""The command line itself."""

import os
import subprocess
import sys
from pathlib import Path

from megavl.data.store import Store
from tests.data.stores import documents, mixed, records, write

ROOT = Path(__file__).parents[2]


def run(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tools" / "merge_data.py"), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=60)


def test_datasets_become_one_that_says_what_it_holds(tmp_path):
    expected = records(write(tmp_path / "a", documents(300))) + records(write(tmp_path / "b", mixed()))
    arguments = ("--input", tmp_path / "a", tmp_path / "b", "--output-prefix", tmp_path / "p")
    result = run(*arguments)
    assert result.returncode == 0, result.stderr
    assert records(Store(str(tmp_path / "p"))) == expected
    assert f"multimodal dataset {tmp_path / 'p'}: 52 documents of 2 datasets, 12 images" in result.stdout
    assert f"{tmp_path / 'a'} was stored as uint16 and is int32 now" in result.stdout
    refused = run(*arguments)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr.startswith(f"error: {tmp_path / 'p'}.bin, ") and "--overwrite" in refused.stderr
    assert run(*arguments, "--overwrite").returncode == 0
