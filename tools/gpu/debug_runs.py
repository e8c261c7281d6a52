"""Runs of the debug presets through launch/pretrain.py: 20 steps, a checkpoint, resumed on a CPU, then on CUDA."""

import json
import math
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gpu.results import Finding, Results, Setting, Skipped

_ROOT = Path(__file__).parents[2]
# A package that launch/pretrain.py imports and the training itself does not need.
_MISSING = re.compile(r"No module named '((?!megavl)[\w.]+)'")
_RECIPES = {"vl": "launch/recipes/vl_debug.yaml", "vl2": "launch/recipes/vl2_debug.yaml"}
# Four micro-batches suffice; a learning rate at which 20 steps show that the model learns.
_OVERRIDES = (
    *("parallel.pipeline=1", "parallel.expert=1", "train.global_batch=4", "train.precision=bf16", "data.workers=0"),
    *("optim.lr=3.0e-3", "optim.schedule.shape=constant", "optim.schedule.warmup_steps=0", "log.tensorboard=false"),
)
_STEPS, _REHEARSED_STEPS = 20, 2
# Least fall of the loss over the first leg, and largest change at a resume: other documents, but the same model.
_LEAST_FALL_NATS, _MOST_CHANGE_NATS = 0.3, 0.7


@dataclass(frozen=True)
class Leg:
    """A part of the run: up to `steps`, on `accelerator`."""

    name: str
    accelerator: str
    steps: int


def run(setting: Setting, results: Results, subject: str) -> None:
    """Measure the legs of the run; where packages that read its data are missing, 20 steps on made-up packs."""
    steps = _REHEARSED_STEPS if setting.rehearse else _STEPS
    try:
        from gpu.debug_data import write_data
    except ImportError as error:
        missing = error.name or str(error)
    else:
        folder = setting.work / f"debug_{subject}"
        made = results.prepare("data", lambda: (write_data(folder, subject), Finding("tokenizer and two datasets")))
        missing = _run_legs(setting, results, subject, steps, folder, made)
    if missing:
        results.measure(f"{steps} steps on made-up packs", lambda: _made_up(subject, steps, setting, missing))


def _run_legs(setting: Setting, results: Results, subject: str, steps: int, folder: Path, data: Sequence[str]) -> str:
    """Measure each leg. Returns the missing package that keeps launch/pretrain.py from starting, "" if it starts."""
    here = setting.device
    legs = [Leg(f"{steps} steps", here, steps), Leg("one more step, resumed on a CPU", "cpu", steps + 1)]
    if not setting.rehearse:  # where all legs are on a CPU, the second has shown what the third does
        legs.append(Leg("one more step, back on CUDA", here, steps + 2))
    small = ("model.decoder.layers=3", "train.global_batch=2") if setting.rehearse else ()
    command = ("--config", _RECIPES[subject], *_OVERRIDES, *data, *small, f"output_dir={folder / 'run'}")
    for before, leg in zip([None, *legs], legs, strict=False):
        if not results.measure(leg.name, lambda leg=leg, before=before: train(command, leg, before, folder, setting)):
            break  # it left no checkpoint to go on from
    last = results.measurements[-1]
    return last["line"] if last["status"] == "skipped" else ""


def train(command: Sequence[str], leg: Leg, before: Leg | None, folder: Path, setting: Setting) -> Finding:
    """One leg: the command line that a user would type, and the losses it wrote."""
    words = [sys.executable, "-m", "launch.pretrain", *command, f"train.steps={leg.steps}"]
    done = subprocess.run(
        ["env", f"DS_ACCELERATOR={leg.accelerator}", *words],
        cwd=_ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(done.stdout, flush=True)
    if done.returncode:
        if missing := _MISSING.search(done.stdout):
            raise Skipped(missing[1])
        last = next((line for line in reversed(done.stdout.splitlines()) if line.strip()), "(no output)")
        raise RuntimeError(f"launch/pretrain.py ended with exit code {done.returncode}: {last}")
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return judge(rows, leg, resumed=before is not None, must_fall=not setting.rehearse)


def judge(rows: list[dict], leg: Leg, resumed: bool, must_fall: bool) -> Finding:
    """Whether every step was done, the loss is finite, and it has fallen, or goes on from where it was."""
    steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
    failures = []
    if steps != list(range(1, leg.steps + 1)):
        failures.append(f"steps {steps} were written, not 1 to {leg.steps}")
    if not all(map(math.isfinite, losses)):
        failures.append("a loss is not finite")
    # Text and images have losses of their own.
    earlier = [row["loss"] for row in rows[:-1] if row["kind"] == rows[-1]["kind"]]
    if resumed:
        before = f"{earlier[-1]:.3f} before" if earlier else "not known before"
        line = f"loss of {rows[-1]['kind']} {before}, {losses[-1]:.3f} after"
        if earlier and not abs(losses[-1] - earlier[-1]) < _MOST_CHANGE_NATS:
            failures.append(f"the loss jumped by {abs(losses[-1] - earlier[-1]):.3f}")
    else:
        line = f"loss {losses[0]:.3f} to {losses[-1]:.3f}"
        if must_fall and not losses[-1] < losses[0] - _LEAST_FALL_NATS:
            failures.append(f"the loss did not fall by {_LEAST_FALL_NATS}")
    return Finding(line, {"losses": losses}, failures=failures)


def _made_up(family: str, steps: int, setting: Setting, missing: str) -> Finding:
    """The same model without launch/pretrain.py: trained on one pack, its loss must fall."""
    from benchmarks.one_process import load_one_process
    from gpu.run import build, packs, start

    env = start()
    run = build(load_one_process(_RECIPES[family], *_OVERRIDES), env)
    batch = packs(run.config, env, run.replica.mesh, "multimodal")
    losses = []
    for _ in range(steps):
        losses.append(run.replica.pipeline.train(batch).item())
        run.replica.engine.step()
        run.replica.balance.step()
    failures = [] if losses[-1] < losses[0] else ["the loss did not fall"]
    return Finding(
        f"launch/pretrain.py and its checkpoint were not run: {missing} is missing; loss {losses[0]:.3f} to "
        f"{losses[-1]:.3f}",
        {"losses": losses},
        failures=failures,
    )
