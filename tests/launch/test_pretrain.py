"""launch/pretrain.py as users start it: launchers, resume, and bad input, each with real processes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megavl.data.encoded import EncodedDocument, EncodedImage
from megavl.data.tokenizer import load_tokenizer
from megavl.data.writer import StoreWriter
from tests.data.conftest import encoded_text, image_bytes
from tests.pool import Pool, free_port

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
ENVIRONMENT = os.environ | {
    # In front of what is there: a machine may have its packages on that path.
    "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
    "PATH": f"{BIN}:{os.environ['PATH']}",
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
}


@pytest.fixture(scope="module")
def recipe(corpus, tmp_path_factory) -> str:
    """A run of two steps on the small corpus; 6 items in the model list, 6 heads."""
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    run = {
        "output_dir": str(path.parent / "run"),
        "model": {
            "preset": "vl_debug",
            "image_token_id": 398,
            "decoder": {
                "layers": 4,
                "width": 48,
                "heads": 6,
                "kv_heads": 6,
                "mlp_width": 72,
                "vocab_size": 402,
            },
        },
        "data": {
            "tokenizer": corpus.tokenizer,
            "text": [{"prefix": corpus.prefix("text")}],
            "multimodal": [{"prefix": corpus.prefix("multimodal")}],
            "text_ratio": 0.5,
            "seq_len": 96,
            "workers": 1,
        },
        "optim": {"lr": 1e-3, "eps": 1e-6, "schedule": {"shape": "constant"}},
        "train": {"steps": 2, "global_batch": 4, "precision": "fp32"},
    }
    path.write_text(yaml.safe_dump(run))
    return str(path)


def start(command: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(
        command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL
    )


def interpreter(recipe: str, *overrides: str) -> subprocess.CompletedProcess:
    """One process with an interpreter of its own."""
    return start([sys.executable, "launch/pretrain.py", "--config", recipe, *overrides])


def plain(recipe: str, *overrides: str) -> subprocess.CompletedProcess:
    """One process, forked where an interpreter of its own makes no difference."""
    return Pool().script(ROOT / "launch" / "pretrain.py", ["--config", recipe, *overrides], ROOT)


def deepspeed(ranks: int, recipe: str, *overrides: str) -> subprocess.CompletedProcess:
    launcher = [str(BIN / "deepspeed"), "--master_port", str(free_port()), "--num_gpus", str(ranks)]
    return start([*launcher, "launch/pretrain.py", "--config", recipe, *overrides])


def torchrun(ranks: int, recipe: str, *overrides: str) -> subprocess.CompletedProcess:
    launcher = [str(BIN / "torchrun"), "--master-port", str(free_port()), "--nproc-per-node", str(ranks)]
    return start([*launcher, "launch/pretrain.py", "--config", recipe, *overrides])


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(rows: list[dict], expected: list[dict]) -> None:
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    for row, reference in zip(rows, expected, strict=True):
        assert row["kind"] == reference["kind"]
        assert row["tokens"] == reference["tokens"]
        assert row["loss"] == pytest.approx(reference["loss"], rel=1e-6)  # measured 1.5e-7
        assert row["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-5)  # measured 1.3e-6


@pytest.fixture(scope="module")
def one_process(recipe, tmp_path_factory) -> list[dict]:
    """Metrics of three steps of one plain process, which other launchers and topologies must give."""
    folder = tmp_path_factory.mktemp("one")
    done = interpreter(recipe, "train.steps=3", f"output_dir={folder}")
    assert done.returncode == 0, done.stderr
    return metrics(folder)


def test_metrics_have_one_whole_object_for_each_step(one_process):
    assert [row["step"] for row in one_process] == [1, 2, 3]
    for row in one_process:
        assert {"step", "kind", "loss", "grad_norm", "lr", "tokens", "images", "tiles"} < row.keys()
        assert {"tokens_per_s", "step_s", "mfu", "memory_bytes"} < row.keys()
        mine, other = ("text", "multimodal") if row["kind"] == "text" else ("multimodal", "text")
        assert row[f"loss_{mine}"] == row["loss"]
        assert row[f"loss_{other}"] is None
        assert 0 < row["mfu"] < 1


def test_deepspeed_resumes_under_torchrun_on_another_topology(recipe, tmp_path, one_process):
    """TP3 with sequence parallelism for two steps, then PP2 for the third."""
    three = ("parallel.tensor=3", "parallel.sequence=true", f"output_dir={tmp_path}")
    done = deepspeed(3, recipe, *three)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "checkpoints" / "step_00000002" / "state.json").is_file()
    done = torchrun(2, recipe, "train.steps=3", "parallel.pipeline=2", f"output_dir={tmp_path}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "from step 2 to 3" in done.stdout
    assert "optimizer: torch AdamW, fused (" in done.stdout
    assert "parallel.tensor: 3 -> 1" in done.stdout
    assert_same_run(metrics(tmp_path), one_process)
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_finished_run_has_nothing_to_do(recipe, tmp_path):
    for expected in (1, 1):
        done = plain(recipe, "train.steps=1", f"output_dir={tmp_path}")
        assert done.returncode == 0, done.stderr
        assert len(metrics(tmp_path)) == expected
    assert "from step 1 to 1" in done.stdout


def test_dry_run_imports_no_torch(recipe):
    program = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    program += "; assert 'torch' not in sys.modules"
    done = start(
        [
            sys.executable,
            "-c",
            program,
            "launch/pretrain.py",
            "--config",
            recipe,
            "--dry-run",
            "--world",
            "4",
            "train.steps=40",
        ]
    )
    assert done.returncode == 0, done.stderr
    assert "stem" in done.stdout
    assert re.search(
        r"Data, as expected: \d+ text and \d+ multimodal steps .*\nsource .* epochs\n.*/text +text +100.00%",
        done.stdout,
    )


def test_dry_run_says_which_files_of_the_data_are_absent_and_refuses_repeats(recipe, corpus):
    done = plain(recipe, "--dry-run", "data.text=[{prefix: nowhere/text}]")
    assert done.returncode == 0, done.stderr
    assert (
        "Data: files are missing, without which this run would not start:\n"
        "  data.text[0].prefix: no file nowhere/text.bin, nowhere/text.idx, nowhere/text.meta; make it with"
    ) in done.stdout
    limited = f"data.text=[{{prefix: {corpus.prefix('text')}, max_epochs: 0.01}}]"
    refused(plain(recipe, "--dry-run", "train.steps=40", limited), corpus.prefix("text"), "max_epochs is 0.01")


def test_a_rank_is_executed_without_a_device(recipe):
    """Its report is all that is printed, and nothing is written."""
    done = plain(recipe, "--dry-run", "--execute", "1", "--world", "2", "parallel.pipeline=2", "output_dir=nowhere")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("vl_debug, rank 1 of 2: pipeline 1 of 2, data 0 of 1, tensor 0 of 1; stage 1: block")
    assert re.search(r"^ *multimodal: forward and backward +[\d. ]+$", done.stdout, re.MULTILINE), done.stdout
    assert re.search(r"^ *pipeline +receive +4 ", done.stdout, re.MULTILINE), done.stdout
    assert not done.stderr and not (ROOT / "nowhere").exists()


@pytest.mark.parametrize(
    ("rank", "world", "reason"), [("2", "2", "2 ranks have no rank 2"), ("0", "3", "3 ranks are not divisible")]
)
def test_a_rank_that_does_not_exist_is_not_executed(recipe, rank, world, reason):
    refused(plain(recipe, "--dry-run", "--execute", rank, "--world", world, "parallel.pipeline=2"), reason)


@pytest.mark.parametrize(("option", "value"), [("--world", "2"), ("--execute", "0"), ("--device", "h100")])
def test_options_of_a_dry_run_are_for_nothing_else(recipe, option, value):
    done = plain(recipe, option, value)
    assert done.returncode == 2 and re.search(rf"error: {option} {value}.* --dry-run", done.stderr), done.stderr


def refused(done: subprocess.CompletedProcess, *parts: str) -> None:
    """Ended with one readable message on all ranks; the only traceback may be torchrun's own of a failed child."""
    said = done.stdout + done.stderr
    assert done.returncode != 0
    assert said.count("error: ") == 1, said
    assert 'pretrain.py", line' not in said, said
    for part in parts:
        assert part in said, said


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["train.stepz=3"], ["train.stepz", "steps"]),
        (["parallel.tensor=4"], ["heads = 6", "parallel.tensor = 4"]),
        (["parallel.tensor=5"], ["vocab_size = 402", "parallel.tensor = 5"]),
        (["parallel.pipeline=4", "parallel.stages=null"], ["6 items"]),
        (["parallel.tensor=2"], ["1 ranks are not divisible"]),
        (["train.global_batch=3", "train.micro_batch=2"], ["train.global_batch = 3 is not divisible"]),
        (["data.text=[{prefix: nowhere/text}]"], ["nowhere/text.bin", "preprocess_data.py"]),
        (["data.text=[{prefix: data/quickstart_absent/text}]", "data.tokenizer=absent.model"], ["absent.model"]),
    ],
)
def test_a_bad_configuration_is_one_message(recipe, tmp_path, overrides, parts):
    refused(plain(recipe, *overrides, f"output_dir={tmp_path / 'run'}"), *parts)
    assert not (tmp_path / "run").exists()


def test_a_topology_that_does_not_divide_the_world_is_one_message_of_all_ranks(recipe, tmp_path):
    done = torchrun(3, recipe, "parallel.tensor=2", f"output_dir={tmp_path / 'run'}")
    refused(done, "3 ranks are not divisible by parallel.tensor * parallel.pipeline = 2 * 1 = 2")
    assert not (tmp_path / "run").exists()


def copied_store(corpus, name: str, folder: Path) -> Path:
    for ending in (".bin", ".idx", ".meta"):
        (folder / f"{name}{ending}").write_bytes(Path(f"{corpus.prefix(name)}{ending}").read_bytes())
    return folder / name


def test_a_truncated_store_is_one_message_of_all_ranks(recipe, corpus, tmp_path):
    prefix = copied_store(corpus, "text", tmp_path)
    whole = (tmp_path / "text.bin").read_bytes()
    (tmp_path / "text.bin").write_bytes(whole[:-7])
    done = torchrun(2, recipe, f"data.text=[{{prefix: {prefix}}}]", f"output_dir={tmp_path / 'run'}")
    refused(done, "text.bin", str(len(whole) - 7))
    assert not (tmp_path / "run").exists()


def test_a_store_of_another_tokenizer_is_refused(recipe, corpus, tmp_path):
    other = tmp_path / "other.model"
    other.write_bytes(Path(corpus.tokenizer).read_bytes() + b"\x1a\x00")
    done = plain(recipe, f"data.tokenizer={other}", f"output_dir={tmp_path / 'run'}")
    refused(done, "tokenizer", "other.model")


def test_a_broken_image_ends_the_run_on_all_ranks(recipe, corpus, tmp_path):
    image = EncodedImage(image_bytes(0, (50, 50))[:-500], 50, 50)
    with StoreWriter(str(tmp_path / "broken"), load_tokenizer(corpus.tokenizer)) as writer:
        writer.add(EncodedDocument("the-broken-one", "file.jsonl", (encoded_text(5, 6), image, encoded_text(2))))
    done = deepspeed(
        2,
        recipe,
        f"data.multimodal=[{{prefix: {tmp_path / 'broken'}}}]",
        "data.text_ratio=0.0",
        f"output_dir={tmp_path / 'run'}",
    )
    refused(done, "the-broken-one", "image")
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_a_checkpoint_of_another_model_is_refused(recipe, tmp_path):
    run = f"output_dir={tmp_path}"
    assert plain(recipe, "train.steps=1", run).returncode == 0
    done = torchrun(2, recipe, "model.decoder.mlp_width=96", run)
    refused(done, "mlp_width", "72", "96")


def test_a_truncated_checkpoint_is_refused(recipe, tmp_path):
    run = f"output_dir={tmp_path}"
    assert plain(recipe, "train.steps=1", run).returncode == 0
    largest = max((tmp_path / "checkpoints" / "step_00000001").iterdir(), key=lambda path: path.stat().st_size)
    with open(largest, "r+b") as file:
        file.truncate(largest.stat().st_size - 1)
    refused(plain(recipe, run), largest.name)
