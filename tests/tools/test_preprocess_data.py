"""The command line itself."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megavl.data.format import IMAGE
from megavl.data.store import Store
from megavl.data.tokenizer import load_tokenizer
from tests.data.conftest import write_jsonl

ROOT = Path(__file__).parents[2]


def command(*arguments) -> list[str]:
    return [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), *map(str, arguments)]


def run(*arguments, code=0) -> subprocess.CompletedProcess:
    result = subprocess.run(
        command(*arguments), capture_output=True, text=True, cwd=ROOT, env=environment(), timeout=120
    )
    assert result.returncode == code, result.stderr
    return result


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)}


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_files_become_one_store_that_says_what_it_holds(corpus, tmp_path):
    inputs = [corpus.root / "more.jsonl", corpus.root / "multimodal.jsonl"]
    result = run("--input", *inputs, "--output-prefix", tmp_path / "p", "--tokenizer", corpus.tokenizer)
    store = Store(str(tmp_path / "p"))
    store.verify()
    assert len(store) == 70 + 60
    assert (store.key(0), store.source(0)) == ("more-0", str(inputs[0]))
    assert (store.key(70), store.source(70)) == ("0", str(inputs[1]))
    eos = load_tokenizer(corpus.tokenizer).eos
    for document in range(len(store)):
        last = int(store.documents[document + 1]) - 1
        assert store.text(last, 0, int(store.lengths[last]))[-1] == eos
    images = int((store.modes == IMAGE).sum())
    assert f"multimodal dataset {tmp_path / 'p'}: 130 documents" in result.stdout
    assert f"{images} images" in result.stdout and "tokens (int32" in result.stdout


def test_the_output_does_not_depend_on_the_number_of_workers(corpus, tmp_path):
    inputs = [corpus.root / "multimodal.jsonl", corpus.root / "text.jsonl"]
    for workers in (1, 2):
        directory = tmp_path / str(workers)
        run(
            *("--input", *inputs, "--output-prefix", directory / "p", "--tokenizer", corpus.tokenizer),
            *("--workers", workers),
        )
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_documents_without_images_are_a_text_store_of_one_sequence_each(corpus, tmp_path):
    path = write_jsonl(tmp_path / "in.jsonl", [{"text": "a b"}, {"segments": [{"text": "c"}, {"text": " d"}]}])
    run("--input", path, "--output-prefix", tmp_path / "p", "--tokenizer", corpus.tokenizer)
    store = Store(str(tmp_path / "p"))
    assert (len(store), len(store.lengths)) == (2, 2)
    tokenizer = load_tokenizer(corpus.tokenizer)
    assert store.text(1, 0, int(store.lengths[1])).tolist() == [*tokenizer.encode("c d"), tokenizer.eos]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": 3}', 'in.jsonl:101: "text" is a number (3)'),
        ('{"segments": [{"image": "absent.png"}]}', "in.jsonl:101: segment 0: image"),
        ('{"id": "k", "segments": [{"image": "in.jsonl"}]}', "document k: image in.jsonl: "),
    ],
)
def test_bad_input_ends_with_one_line_and_leaves_nothing(corpus, tmp_path, line, message, workers):
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "good"}\n' * 100 + line + "\n")
    result = run(
        *("--input", path, "--output-prefix", tmp_path / "p", "--tokenizer", corpus.tokenizer, "--workers", workers),
        code=1,
    )
    assert "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ") and message in result.stderr.splitlines()[-1]
    assert list(contents(tmp_path)) == ["in.jsonl"]


def test_an_existing_dataset_is_replaced_only_on_request(corpus, tmp_path):
    path = write_jsonl(tmp_path / "in.jsonl", [{"text": "a"}])
    arguments = ("--input", path, "--output-prefix", tmp_path / "p", "--tokenizer", corpus.tokenizer)
    run(*arguments)
    write_jsonl(tmp_path / "in.jsonl", [{"text": "a"}, {"text": "b"}])
    assert "exist already" in run(*arguments, code=1).stderr
    run(*arguments, "--overwrite")
    assert len(Store(str(tmp_path / "p"))) == 2


def large_input(tmp_path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text((json.dumps({"text": "a b c d " * 500}) + "\n") * 3000)
    return path


def start(tmp_path, *arguments) -> subprocess.Popen:
    """Start the command, and wait until it has finished some of its parts."""
    process = subprocess.Popen(
        command(*arguments),
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment(),
        # A shell's background job ignores Ctrl-C, and so would whatever the tests start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while len(finished(tmp_path)) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    return process


def finished(tmp_path) -> list[Path]:
    return [path.parent for path in (tmp_path / "p.parts").glob("*/counts.json") if path.parent.suffix != ".tmp"]


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGINT, 1), (signal.SIGTERM, 2), (signal.SIGKILL, 2)])
def test_the_same_command_goes_on_after_a_kill(corpus, tmp_path, number, workers):
    path = large_input(tmp_path)
    arguments = (
        *("--input", path, "--output-prefix", tmp_path / "p", "--tokenizer", corpus.tokenizer),
        # The slower tokenizer, so that the signal comes before the end.
        *("--workers", workers, "--part-bytes", 1 << 16, "--plain-tokenizer"),
    )
    process = start(tmp_path, *arguments)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert not psutil.wait_procs(children, timeout=20)[1]
    if number == signal.SIGKILL:
        assert process.returncode == -number
    else:
        assert process.returncode == 128 + number
        assert said == "interrupted; the same command goes on where it stopped\n"
        assert not list((tmp_path / "p.parts").glob("*.tmp"))
    assert not (tmp_path / "p.bin").exists()
    done = sum(json.loads((shard / "counts.json").read_text())["input_bytes"] for shard in finished(tmp_path))
    assert 3 << 15 < done < path.stat().st_size
    share = f"{done / path.stat().st_size:.0%} of the input was done already by an earlier run"
    assert share in run(*arguments).stdout
    resumed = contents(tmp_path)
    assert sorted(resumed) == ["in.jsonl", "p.bin", "p.idx", "p.meta"]
    assert "by an earlier run" not in run(*arguments, "--overwrite").stdout
    assert contents(tmp_path) == resumed


def test_two_processes_do_not_build_one_dataset(corpus, tmp_path):
    arguments = (
        *("--input", large_input(tmp_path), "--output-prefix", tmp_path / "p", "--tokenizer", corpus.tokenizer),
        *("--workers", 1, "--part-bytes", 1 << 16),
    )
    process = start(tmp_path, *arguments)
    try:
        refused = run(*arguments, code=1).stderr
    finally:
        process.kill()
        process.communicate()
    assert f"error: {tmp_path / 'p'} is being built by process {process.pid} on " in refused
    # The lock of a process that was killed is free.
    run(*arguments)


def test_bad_records_within_the_budget_are_left_out_and_written_down(corpus, tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "good"}\n' * 100 + '{"text": 3}\n{"text": "good"}\n{"image": "no.png", "text": "a"}\n')
    arguments = ("--input", path, "--output-prefix", tmp_path / "p", "--tokenizer", corpus.tokenizer, "--workers", 1)
    many = run(*arguments, "--max-bad", 1, "--part-bytes", 100, code=1).stderr.splitlines()[-1]
    assert many.startswith(f"error: {path}:103: image 0: ")
    assert many.endswith("(more than --max-bad 1 records are bad)")
    assert "2 bad records were left out" in run(*arguments, "--max-bad", 2, "--part-bytes", 100).stdout
    rejected = [json.loads(line) for line in (tmp_path / "p.rejected.jsonl").read_text().splitlines()]
    assert [entry["where"] for entry in rejected] == [f"{path}:101", f"{path}:103"]
    assert rejected[0]["reason"] == '"text" is a number (3); it must be a string'
    assert len(Store(str(tmp_path / "p"))) == 101
    # A dataset without bad records has no file that tells of them.
    path.write_text('{"text": "good"}\n')
    run(*arguments, "--overwrite")
    assert sorted(contents(tmp_path)) == ["in.jsonl", "p.bin", "p.idx", "p.meta"]
