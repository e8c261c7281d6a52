"""The quickstart fails loudly: each of its checks can say no."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megavl.config.load import load_run
from megavl.config.rules import check

ROOT = Path(__file__).parents[2]


@pytest.fixture
def quickstart(monkeypatch, tmp_path):
    """The script as a module, in an empty directory."""
    monkeypatch.syspath_prepend(ROOT / "launch")
    import quickstart

    monkeypatch.chdir(tmp_path)
    for model in quickstart.MODELS.values():
        model.run.mkdir(parents=True)
    return quickstart


@pytest.fixture
def model(quickstart):
    return quickstart.MODELS["vl"]


def write_steps(model, steps, loss):
    """`loss` is a function of the step."""
    rows = [
        {"step": s, "kind": "text" if s % 2 else "multimodal", "loss": loss(s), "tokens": 100, "step_s": 0.5}
        for s in steps
    ]
    with model.metrics.open("a") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)


def test_summary_of_a_run_that_learned(quickstart, model, capsys):
    write_steps(model, range(1, 31), lambda step: 8 - step / 10)
    write_steps(model, range(21, 61), lambda step: 8 - step / 10)
    assert quickstart.summary(model, 1.0)
    out = capsys.readouterr().out
    assert "PP2 x DP2: steps 1 to 30, 200 tokens/s" in out
    assert "TP2 x PP2 + sequence: steps 21 to 60, 200 tokens/s" in out
    assert "text            30                 7.700            3.000" in out


def test_summary_of_a_run_that_did_not_learn(quickstart, model, capsys):
    write_steps(model, range(1, 31), lambda step: 8 - step / 10 if step % 2 else 8.0)
    write_steps(model, range(21, 61), lambda step: 8 - step / 10 if step % 2 else 8.0)
    assert not quickstart.summary(model, 1.0)
    assert capsys.readouterr().out.count("DID NOT FALL") == 1


def test_summary_of_a_run_that_was_never_resumed(quickstart, model):
    write_steps(model, range(1, 61), lambda step: 8 - step / 10)
    assert not quickstart.summary(model, 1.0)


def test_a_line_being_written_is_not_a_step(quickstart, model):
    assert quickstart.steps_done(model) == []
    write_steps(model, range(1, 4), lambda step: 1.0)
    with model.metrics.open("a") as out:
        out.write('{"step": 4, "ki')
    assert [row["step"] for row in quickstart.steps_done(model)] == [1, 2, 3]


def test_a_command_that_fails_ends_with_its_code(quickstart, capsys):
    with pytest.raises(SystemExit) as ended:
        quickstart.run(f"{sys.executable} -c 'raise SystemExit(7)'")
    assert ended.value.code == 7 and "exit code 7" in capsys.readouterr().err


def test_ranks_are_found_below_the_launcher(quickstart):
    sleeper = f"{sys.executable} -c 'import time; time.sleep(60)'"
    launcher = subprocess.Popen(f"{sleeper} --local_rank=0 & {sleeper} --local_rank=1 & {sleeper} & wait", shell=True)
    try:
        deadline = time.monotonic() + 20
        while len(ranks := quickstart.ranks_of(launcher)) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert sorted(ranks) == [0, 1]
        assert all(process.ppid() == launcher.pid for process in ranks.values())
    finally:
        for process in quickstart.psutil.Process(launcher.pid).children(recursive=True):
            process.kill()
        launcher.wait()


def test_a_run_that_stops_by_itself_is_no_kill(quickstart, model):
    write_steps(model, range(1, 4), lambda step: 1.0)
    launcher = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(SystemExit, match="stopped by itself after 3 steps, exit code 3"):
        quickstart.wait_for_step(model, 10, launcher)


def test_a_silent_run_is_given_up(quickstart, model, monkeypatch):
    monkeypatch.setattr(quickstart, "SILENCE_S", 0.3)
    launcher = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        with pytest.raises(SystemExit, match="no step for"):
            quickstart.wait_for_step(model, 10, launcher)
    finally:
        launcher.kill()
        launcher.wait()


def test_a_launcher_that_survives_a_killed_rank_is_caught(quickstart, model):
    """A launcher that takes a killed rank for success: its exit code is 0."""
    write_steps(model, range(1, quickstart.KILL_AFTER_STEP + 1), lambda step: 1.0)
    model.metrics.rename("steps.jsonl")
    ranks = "".join(f"{sys.executable} -c 'import time; time.sleep(4)' --local_rank={rank} & " for rank in range(4))
    with pytest.raises(SystemExit, match="the launcher's exit code is 0"):
        quickstart.train_and_kill(model, f"{ranks}sleep 1; cp steps.jsonl {model.metrics}; wait")


@pytest.mark.parametrize("name", ["vl", "vl2"])
def test_a_recipe_is_of_its_model_and_both_topologies_hold_it(quickstart, name):
    model = quickstart.MODELS[name]
    for topology in (model.before, model.after):
        config = load_run(ROOT / model.recipe, topology.overrides.split())
        check(config, quickstart.RANKS)
        assert config.model.family == name and config.output_dir == str(model.run)
        sources = {source.prefix for source in (*config.data.text, *config.data.multimodal)}
        assert sources == {f"{model.data}/{dataset}" for dataset in model.trained}
        # A checkpoint before the kill, not with it, and steps behind it.
        saved = quickstart.KILL_AFTER_STEP // config.checkpoint.every * config.checkpoint.every
        assert 0 < saved < quickstart.KILL_AFTER_STEP < config.train.steps


@pytest.mark.long
@pytest.mark.parametrize("name", ["vl", "vl2"])
def test_the_main_job_from_documents_to_a_transformers_checkpoint(name, tmp_path):
    """In a copy of what git tracks: the quickstart deletes its own folders when it begins."""
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for file in filter(None, tracked.split("\0")):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [sys.executable, "launch/quickstart.py", "--model", name],
        cwd=tmp_path,
        env=os.environ | {"PATH": path, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert (tmp_path / "data").is_dir() and list((tmp_path / "runs").rglob("*.png"))
