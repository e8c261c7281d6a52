"""The command line itself."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.data.construct import test_pdf
from tests.data.construct.test_plots import FIVE, plot
from tests.data.readers.reading import documents
from tests.data.readers.test_notebook import code
from tests.data.readers.test_notebook import write as write_notebook

ROOT = Path(__file__).parents[2]


def start(*arguments) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "tools" / "construct_data.py"), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def run(*arguments, code=0) -> tuple[str, str]:
    process = start(*arguments)
    out, error = process.communicate(timeout=120)
    assert process.returncode == code, error
    return out, error


def test_notebooks_become_documents_and_the_drops_are_counted(tmp_path):
    (tmp_path / "in").mkdir()
    for number in range(3):
        write_notebook(tmp_path / "in" / f"{number}.ipynb", [code(FIVE + "\ny = 2", plot()), code("z = 1", plot())])
    out, _ = run("plots", "--input", tmp_path / "in", "--output", tmp_path / "out")
    assert out.startswith(f"{tmp_path / 'out'}: 3 samples of 3 files")
    assert "  dropped 3: fewer than 5 lines of code" in out
    assert len(documents(tmp_path / "out" / "documents.jsonl")) == 3
    out, _ = run("plots", "--input", tmp_path / "in", "--output", tmp_path / "more", "--min-lines", "1")
    assert "6 samples" in out


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("plots", "--input", "absent"), 1, "error: absent: no such file; check --input"),
        (("pdf", "--input", "x.pdf", "--dpi", "9"), 2, "argument --dpi: 9: an integer from 36 to 600"),
        (("render", "--input", "x", "--templates", "poster"), 2, "invalid choice: 'poster'"),
    ],
)
def test_a_mistake_ends_in_one_message(tmp_path, arguments, status, message):
    _, error = run(*arguments, "--output", tmp_path / "out", code=status)
    assert message in error.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_a_polite_kill_does_not_wait_for_the_part_in_work(tmp_path):
    path = test_pdf.write(tmp_path / "long.pdf", [{20: test_pdf.LETTERS}] * 2000)
    process = start("pdf", "--input", path, "--output", tmp_path / "out", "--workers", 2)
    deadline = time.monotonic() + 60
    images = tmp_path / "out.partial" / "output" / "images" / "00000"
    while not (images.exists() and any(images.iterdir())) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert 0 < len(list(images.iterdir())) < 2000
    assert not (tmp_path / "out").exists()
